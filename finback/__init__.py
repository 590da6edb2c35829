"""finback builds, teaches, checks and serves DeepSeek-class language models, and shows the bill for every step.

    import finback

    llm = finback.LLM("runs/tiny")
    print(llm.chat("8-3+5+4-6=?"))

What is named here is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finback.api import Results, compare, plan, run
    from finback.engine.llm import LLM, Output
    from finback.engine.open import load
    from finback.engine.request import SamplingParams
    from finback.model.config import ModelConfig
    from finback.stages.distill import Distill
    from finback.stages.evaluate import Evaluate, Exam
    from finback.stages.extend import Extend
    from finback.stages.grpo import GRPO
    from finback.stages.prepare import Prepare
    from finback.stages.pretrain import Pretrain
    from finback.stages.reject import Reject
    from finback.stages.sft import SFT
    from finback.tasks.task import Task

__version__ = "0.1.0"
__all__ = [
    "GRPO",
    "LLM",
    "SFT",
    "Distill",
    "Evaluate",
    "Exam",
    "Extend",
    "ModelConfig",
    "Output",
    "Prepare",
    "Pretrain",
    "Reject",
    "Results",
    "SamplingParams",
    "Task",
    "compare",
    "load",
    "plan",
    "run",
]

_MODULES = {
    "api": ("Results", "compare", "plan", "run"),
    "engine.llm": ("LLM", "Output"),
    "engine.open": ("load",),
    "engine.request": ("SamplingParams",),
    "model.config": ("ModelConfig",),
    "stages.evaluate": ("Evaluate", "Exam"),
    "tasks.task": ("Task",),
    **{f"stages.{n.lower()}": (n,) for n in ("Prepare", "Pretrain", "Extend", "SFT", "GRPO", "Reject", "Distill")},
}
_MODULE_OF = {name: f"finback.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'finback' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
