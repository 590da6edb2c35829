"""finback builds, trains, evaluates and serves DeepSeek-class language models, and reports the cost of every step.

    import finback

    llm = finback.LLM("runs/tiny")
    print(llm.chat("8-3+5+4-6=?"))

Names are imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finback.api import Results as Results
    from finback.api import compare as compare
    from finback.api import plan as plan
    from finback.api import run as run
    from finback.engine.llm import LLM as LLM
    from finback.engine.llm import Output as Output
    from finback.engine.open import load as load
    from finback.engine.request import SamplingParams as SamplingParams
    from finback.model.config import ModelConfig as ModelConfig
    from finback.stages.distill import Distill as Distill
    from finback.stages.evaluate import Evaluate as Evaluate
    from finback.stages.evaluate import Exam as Exam
    from finback.stages.extend import Extend as Extend
    from finback.stages.grpo import GRPO as GRPO
    from finback.stages.prepare import Prepare as Prepare
    from finback.stages.pretrain import Pretrain as Pretrain
    from finback.stages.reject import Reject as Reject
    from finback.stages.sft import SFT as SFT
    from finback.tasks.task import Task as Task

__version__ = "0.2.0"

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
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'finback' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
