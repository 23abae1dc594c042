from typing import Any

class COCO:
    dataset: Any
    anns: dict[Any, Any]
    imgs: dict[Any, Any]
    cats: dict[Any, Any]
    def __init__(self, annotation_file: Any = ...) -> None: ...
    def __getattr__(self, name: str) -> Any: ...
