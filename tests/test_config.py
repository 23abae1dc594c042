"""The configuration: bounds and meaning of every setting, reading by type, errors in sentences."""

import math
from typing import Literal, get_args, get_origin

import pytest

import convert.options
from sam3jax.config import (
    PRESETS,
    Config,
    ConfigError,
    ModelConfig,
    dump_config,
    load_config,
    parse_config,
)
from sam3jax.config.settings import bare, bounds, marks, section_of, settings
from sam3jax.options import parse

ALL = {s.name: s.field for s in settings()}
NUMBERS = {n: bare(f.annotation)[0] for n, f in ALL.items() if bare(f.annotation)[0] in (int, float)}  # fmt: skip
SWITCHES = [n for n, f in ALL.items() if f.annotation is bool]
CHOICES = [n for n, f in ALL.items() if get_origin(f.annotation) is Literal]


def nested(name: str, value) -> dict:
    """{"optim": {"beta1": value}} of optim.beta1."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def refused(name: str, value) -> str:
    """The sentence that both ways of giving a value end with."""
    with pytest.raises(ConfigError) as error:
        parse_config(nested(name, value))
    assert str(error.value).startswith(f"config key {name}")
    assert "\n" not in str(error.value)
    return str(error.value)


def limits(name: str) -> dict[str, float]:
    found = {}
    for mark in marks(ALL[name]):
        found |= {k: getattr(mark, k) for k in ("ge", "gt", "le", "lt") if hasattr(mark, k)}
    return found


def test_every_field_of_every_section_has_a_sentence():
    def walk(section):
        for name, field in section.model_fields.items():
            said = (field.description or "").strip()
            assert len(said) > 10, f"{section.__name__}.{name} has no description"
            assert said.endswith("."), f"{section.__name__}.{name}: {said!r} is no sentence"
            assert len(said.splitlines()) == 1
            if inner := section_of(field.annotation):
                walk(inner)

    walk(Config)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_refused_beyond_its_bounds(name):
    found = limits(name)
    assert found.keys() & {"ge", "gt"}, f"{name} has no lower bound"
    assert found.keys() & {"le", "lt"}, f"{name} has no upper bound"
    low = found["ge"] - 1 if "ge" in found else found["gt"]
    high = found["le"] + 1 if "le" in found else found["lt"]
    whole = NUMBERS[name] is int
    wrong = [low, high, -(10**18), 10**18, math.nan, math.inf, -math.inf, True, "many", [1], {}]
    wrong += [1.5] if whole else []
    for value in wrong:
        said = refused(name, value)
        assert bounds(ALL[name]) in said, said
    for text in (".nan", "nan", ".inf", "-inf", "true", str(low), str(high)):
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            load_config(None, [f"{name}={text}"])


@pytest.mark.parametrize("name", NUMBERS)
def test_the_defaults_lie_within_the_bounds_and_can_be_written(name):
    default = ALL[name].get_default()
    written = "null" if default is None else repr(default)
    config = load_config(None, [f"{name}={written}"])
    assert config == Config()
    assert "null" not in written or ALL[name].annotation != NUMBERS[name]


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_are_true_or_false_and_nothing_else(name):
    for text, value in {"true": True, "off": False, "Yes": True, "FALSE": False}.items():
        found = load_config(None, [f"{name}={text}"])
        for part in name.split("."):
            found = getattr(found, part)
        assert found is value
    for value in (1, 0, "maybe", None, 0.5):
        assert "expected true or false" in refused(name, value)


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_listed_and_the_nearest_is_named(name):
    choices = get_args(ALL[name].annotation)
    said = refused(name, f"{choices[-1]}x")
    assert " or ".join(map(str, choices)) in said
    for choice in choices:
        found = load_config(None, [f"{name}={choice}"])
        for part in name.split("."):
            found = getattr(found, part)
        assert found == choice
    assert f"did you mean {choices[-1]}?" in said


@pytest.mark.parametrize(
    "word",
    [
        "seed=-1", "optim.beta2=5", "loss.loss_mask=.nan", "model.dropout=7", "model.queries=0",
        "evaluation.nms=7", "evaluation.batches=0", 'data.phrases={person: ""}', "batch_size=true",
        'data.phrases={"": person}', 'data.phrases={person: "  "}', "data.negative_phrases=['']",
        "output=", "lora.targets=['']", "steps=1:30", "steps=0x10", "evaluation.nms=-0.1", "keep=1.5",
        "loss.num_sample_points=0", "loss.mask_pairs=0", "optim.timescale=0", "model.vit_stages=0",
        "model.vit_heads=0", "model.patch_size=0", "model.window_size=0", "model.image_size=0",
        "model.pretrain_image_size=100", "lora=7", "model=tiny", "data=[]", "batch_size=", "optim.ema=1",
        "data.window=[1]", "data.window=[5, 1]", "data.window=[.nan, 1]", "data.window=[a, b]", "data.window=5",
        "data.slices=2", "data.negative_phrases=a cat, a dog", "trackers=tensorboard,wandb", "trackers=[wandbb]",
        "output=a\nb", "init='a\0b'", "data.window=0,255",
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(word):
    with pytest.raises(ConfigError) as error:
        load_config(None, [word])
    key = word.partition("=")[0]
    assert key in str(error.value) or key.rpartition(".")[2] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("output=1e5", "1e5"), ("output=007", "007"), ("output=2024-01-01", "2024-01-01"),
        ("output=yes", "yes"), ("output='a: b'", "a: b"), ("output=a: b", "a: b"), ("output=[1]", "[1]"),
        ("output=@scratch/run", "@scratch/run"), ('output="null"', "null"), ("output=0x1", "0x1"),
        ("init=7", "7"), ("init=null", None), ("init=", None), ("init=~", None), ("init='~'", "~"),
        ("data.train=2024", "2024"), ("data.train=1_000", "1_000"), ("data.valid=None", None),
        ("best_metric=a=b", "a=b"), ("optim.learning_rate=1e-4", 1e-4), ("optim.learning_rate=1", 1.0),
        ("steps=1e4", 10_000), ("steps=1_000", 1000), ("steps='5'", 5), ("steps=010", 10),
        ("evaluation.nms=None", None), ("evaluation.nms=.5", 0.5), ("data.phrases={1: no}", {"1": "no"}),
        ("data.phrases.person=on", {"person": "on"}), ("data.negative_phrases=[2024, 1e5, off]", ("2024", "1e5", "off")),
        ("trainable=*", ("*",)), ("trainable=", ()), ("trainable=[]", ()), ("data.flip=off", False), ("resume=off", "false"),
        ("data.negative_phrases=wet paint", ("wet paint",)), ("data.negative_phrases=['a, b']", ("a, b",)),
        ("data.negative_phrases='a, b'", ("a, b",)), ("lora.targets=*.blocks.[0,1].*", ("*.blocks.[0,1].*",)), ("data.slices=3", 3),
        ("data.window=[-1e3, 400]", (-1000.0, 400.0)), ("data.window=null", None),
    ],
)  # fmt: skip
def test_a_value_is_read_as_its_field_wants_it(word, value, tmp_path):
    """On the command line, and in a file where YAML allows the line."""
    name, _, written = word.partition("=")
    found = load_config(None, [word])
    for part in name.split("."):
        found = getattr(found, part) if not isinstance(found, dict) else found
    assert found == value
    assert type(found) is type(value)
    if written[:1] not in ("*", "@") and not (name == "output" and written in ("a: b", "[1]")):
        file = tmp_path / "config.yaml"
        parts = name.split(".")
        lines = [f"{'  ' * i}{part}:" for i, part in enumerate(parts)]
        file.write_text("\n".join(lines) + f" {written}\n")
        again = load_config(file)
        assert again == load_config(None, [word])
        assert parse_config(again.model_dump()) == again


def test_what_is_written_is_read_back(tmp_path):
    words = [
        "output=1e5", "init=null", "data.train=2024", "data.phrases={1: no}", "steps=7", "optim.ema=1e-9",
        "data.negative_phrases=[off, 'null', '~', ' spaced ']", "model.preset=tiny",
    ]  # fmt: skip
    config = load_config(None, words)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
    assert load_config(file, ["steps=8"]) == config.model_copy(update={"steps": 8})


def test_words_are_laid_over_the_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("data:\noptim: &o\n  beta1: 0.5\nsteps: 5\n")
    config = load_config(file, ["data.train=x", "optim.beta2=0.5", "steps=6", "steps=7"])
    assert (config.data.train, config.optim.beta1, config.optim.beta2, config.steps) == ("x", 0.5, 0.5, 7)  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- a\n", "holds a list"), (b"steps\n", "holds a text"), (b"a: b: c\n", "not readable YAML"),
        (b"steps: 1\nsteps: 2\n", "steps is given twice"), (b"\xff\xfe\x00", "not readable YAML"),
        (b"stepps: 1\n", "unknown config key stepps, did you mean steps?"), (b"data: &d {phrases: *d}\n", ""),
        (b"data:\n  trian: x\n", "unknown config key data.trian, did you mean train?"),
        (b"data:\n  xyz: x\n", "unknown config key data.xyz; known keys: train, valid,"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_get_one_line(tmp_path, content, words):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_setting_is_said():
    for word in ("steps", "=5", "--steps"):
        with pytest.raises(ConfigError, match=r"is no setting: write section\.key=value"):
            load_config(None, [word])
    with pytest.raises(ConfigError, match="steps is a value, not a section"):
        load_config(None, ["steps=5", "steps.more=6"])


def test_all_errors_are_said_at_once():
    with pytest.raises(ConfigError, match=r"optim\.beta1.*; .*seed"):
        load_config(None, ["seed=-1", "optim.beta1=2"])


def test_sizes_are_checked_with_the_defaults_only_where_no_weights_bring_theirs():
    with pytest.raises(ConfigError, match=r"config key model: image_size 84 .* use a multiple of 336"):  # fmt: skip
        load_config(None, ["model.image_size=84"])
    for preset in ([], ["model.preset=tiny"]):
        config = load_config(None, ["init=somewhere", "model.image_size=84", *preset])
        assert config.model.model_fields_set - {"preset"} == {"image_size"}
    with pytest.raises(ConfigError, match=r"model\.image_size.*1 to 16,384"):
        load_config(None, ["init=somewhere", "model.image_size=0"])


def test_the_presets_are_whole_models():
    for name, sizes in PRESETS.items():
        config = parse_config({"preset": name}, ModelConfig)
        assert {k: getattr(config, k) for k in sizes} == sizes
    assert ModelConfig(preset="tiny", dim=128).dim == 128
    assert not parse_config({"loss": {"preset": "published_boxes"}}).loss.masks


def test_configurations_can_be_arguments_of_jitted_functions():
    config = Config()
    for part in (config.model, config.loss, config.lora):
        assert hash(part) == hash(part.model_copy())
        with pytest.raises(ValueError, match="frozen"):
            setattr(part, next(iter(type(part).model_fields)), None)


def test_the_home_folder_is_found_in_settings_and_options(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text(
        "output: ~/runs/x\ninit: ~/sam3.pt\ndata: {train: ~/data, valid: a~/b}\n"
    )
    found = load_config("~/c.yaml")
    assert (found.output, found.init) == (f"{tmp_path}/runs/x", f"{tmp_path}/sam3.pt")
    assert (found.data.train, found.data.valid) == (f"{tmp_path}/data", "a~/b")
    words = ["p.png", "--run=~/runs/x", "--output", "~/found", "--phrase", "a ~/b"]
    options = parse("predict", words)
    assert (options.run, options.output) == (f"{tmp_path}/runs/x", f"{tmp_path}/found")
    assert options.phrase == ["a ~/b"]
    asked = convert.options.parse("convert", ["inspect", "~/sam3.pt"])
    assert asked.path == tmp_path / "sam3.pt"
