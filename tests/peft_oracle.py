"""Runs in a separate environment (`make test-slow` creates it): what transformers and peft compute for given cases.

A case on stdin names a base in Hugging Face's files and either an adapter to load or the settings of one to create.
The answer, a safetensors file, has logits, next-token loss, adapter gradients, and the adapter after one AdamW step.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file


def answer(case: dict[str, Any]) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(
        case["base"], dtype=torch.float32, attn_implementation="eager"
    )
    if "adapter" in case:
        model: Any = PeftModel.from_pretrained(base, case["adapter"], is_trainable=True)
    else:
        model = get_peft_model(base, LoraConfig(**case["make"], task_type="CAUSAL_LM"))
        torch.manual_seed(case["seed"])
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.1)
        model.save_pretrained(case["out"], save_embedding_layers=False)
    model.eval()
    ids = torch.tensor(case["ids"])
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    learnt = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    found = {f"grad.{n}": p.grad.clone() for n, p in learnt.items()}
    torch.optim.AdamW(learnt.values(), lr=case["lr"], betas=(0.9, 0.95), weight_decay=0.01).step()
    found |= {f"step.{n}": p.detach().clone() for n, p in learnt.items()}
    found |= {"logits": logits.detach(), "loss": loss.detach()[None]}
    save_file({n: t.contiguous() for n, t in found.items()}, Path(case["out"]) / "answer.safetensors")


if __name__ == "__main__":
    for each in json.load(sys.stdin):
        answer(each)
