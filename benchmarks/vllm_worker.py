"""What vLLM's workers on CPUs need to take new weights of a mixture of experts: --worker-extension-cls vllm_worker.Reload.

vLLM 0.32 packs experts for its CPU kernel once, when that is made, and copies later weights into the packed storage as they
come: the model is then neither the old nor the new one. Dropped kernels are made again, and pack what is there.
Stands alone: it runs where vLLM is installed, and finback need not be.
"""

from typing import Any


class Reload:
    """Mixed into vLLM's worker; called by POST /collective_rpc."""

    model_runner: Any
    reload_weights: Any

    def reload_experts(self, weights_path: str) -> None:
        """As reload_weights, for models with experts too."""
        for module in self.model_runner.get_model().modules():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None
        self.reload_weights(weights_path=weights_path)
