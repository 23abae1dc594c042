"""The forms that torch weights come in."""

LAYOUTS = ("official", "huggingface")
FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
