from typing import Any

class COCOeval:
    params: Any
    eval: Any
    stats: Any
    evalImgs: Any
    ious: Any
    def __init__(self, cocoGt: Any = ..., cocoDt: Any = ..., iouType: str = ...) -> None: ...
    def __getattr__(self, name: str) -> Any: ...
