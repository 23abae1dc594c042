"""Weights on the Hugging Face hub: `facebook/sam3` as a folder in the hub's own cache."""

from __future__ import annotations

from pathlib import Path

from convert.folders import BESIDE, CARRIED, shards_of, weights_among
from sam3jax.files import FileError

# Public, and small: the vocabulary that SAM 3's text tower reads.
_VOCABULARIES = ("facebook/sam3", "openai/clip-vit-large-patch14")


def fetch(repository: str) -> Path:
    """The folder with one checkpoint of a repository and what lies beside it, downloaded if need be.

    Tokens, the place of the cache and HF_HUB_OFFLINE are huggingface_hub's own affair. Where the hub cannot be
    asked, what was downloaded before is taken. Raises FileError that says what to do.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = HfApi().list_repo_files(repository)
        wanted = [weights_among(names, repository)]
        wanted += [wanted[0] + CARRIED, *shards_of(wanted[0], names), *BESIDE]
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except FileError:
        raise
    except Exception as error:  # whatever its http library raises
        if (folder := _downloaded(repository)) is not None:
            return folder
        raise FileError(_reason(repository, error)) from error


def find_vocabulary() -> Path | None:
    """CLIP's tokenizer.json from the hub's cache, else from the hub; None where neither has it."""
    from huggingface_hub import hf_hub_download

    for here in (True, False):
        for repository in _VOCABULARIES[0 if here else 1 :]:
            try:
                return Path(hf_hub_download(repository, "tokenizer.json", local_files_only=here))
            except Exception:  # not there, or the hub cannot be asked
                continue
    return None


def _downloaded(repository: str) -> Path | None:
    """The folder of an earlier download, if it holds a checkpoint."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
        weights_among((file.name for file in folder.iterdir()), repository)
    except Exception:  # never downloaded, or without weights
        return None
    return folder


def _reason(repository: str, error: Exception) -> str:
    """Why a repository cannot be had, in words."""
    from huggingface_hub import errors

    place = f"https://huggingface.co/{repository}"
    unknown = (errors.RepositoryNotFoundError, errors.HFValidationError)
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} is gated: accept its licence at {place}, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, unknown):
        return (
            f"there is no file or folder {repository}, and the hub shows no repository of this name: check the name; "
            "a private one needs `hf auth login` or HF_TOKEN"
        )
    why = "HF_HUB_OFFLINE is set" if isinstance(error, errors.OfflineModeIsEnabled) else _first_line(error)  # fmt: skip
    return (
        f"there is no file or folder {repository}, its weights are not in the hub's cache, and the hub cannot be asked "
        f"({why}): download it where there is a network, or give the path of a checkpoint"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
