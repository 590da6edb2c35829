"""Runs in an environment of its own (`make test-slow` makes it): what transformers and peft do with the cases on stdin.

A case names a base in Hugging Face's files and either an adapter to load or the settings of one to make, and gets back, in a
safetensors file: logits, the loss of the next token, gradients of the adapter, and the adapter after one step of AdamW.
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
