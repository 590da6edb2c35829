"""Lets vLLM's CPU workers load new weights of a mixture of experts: --worker-extension-cls vllm_worker.Reload.

vLLM 0.32 packs experts once, when it creates its CPU kernel, and copies later weights into the packed storage without
packing them, which corrupts the model. Here the kernels are dropped, so vLLM creates them again and packs the new
weights. This file does not import finback: it runs in vLLM's environment.
"""

from typing import Any


class Reload:
    """Mixed into vLLM's worker; called by POST /collective_rpc."""

    model_runner: Any
    reload_weights: Any

    def reload_experts(self, weights_path: str) -> None:
        """Like reload_weights, but also for models with experts."""
        for module in self.model_runner.get_model().modules():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None
        self.reload_weights(weights_path=weights_path)
