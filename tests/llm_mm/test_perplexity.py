"""The choice among adapters: an adapter that was trained on a task's words finds them again."""

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from graft.llm_mm.perplexity import perplexities, route_by_perplexity
from graft.studio.methods.lora import LoRA


def test_each_task_finds_its_adapter():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=12, pad_token_id=0, **size)).requires_grad_(False).eval()
    handle = LoRA(rank=4, alpha=16, targets="all-linear").attach(model, slots=2)
    optimizer = torch.optim.AdamW(handle.bank.parameters(), lr=2e-2)
    up, down = torch.arange(1, 9).repeat(2, 1), torch.arange(8, 0, -1).repeat(2, 1)
    ids = torch.cat([up, down])
    handle.route(torch.tensor([0, 0, 1, 1]))
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:]).backward()
        optimizer.step()
    handle.route(None)
    words = torch.tensor([[0, 0, 8, 7, 6, 5], [1, 2, 3, 4, 5, 6]])
    inputs = {"input_ids": words, "attention_mask": (words != 0).long()}
    found = perplexities(model, handle, inputs)
    assert handle.routed is None
    handle.route(torch.tensor([1]))
    logits = model(**{name: value[:1] for name, value in inputs.items()}).logits
    expected = F.cross_entropy(logits[0, 2:-1], words[0, 3:]).exp()
    torch.testing.assert_close(found[0, 1], expected)
    assert route_by_perplexity(model, handle, inputs).tolist() == [1, 0]
    assert handle.routed is not None
    assert handle.routed.tolist() == [1, 0]
