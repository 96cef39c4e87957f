"""Encoder-decoders against transformers' T5, Switch and NLLB-MoE: values, gradients, weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_transformers import close, laid_out, randomize, same
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

import moegen
from moegen.convert import ConversionError, to_huggingface, to_moegen

DATA = Path(__file__).parent / "data" / "transformers" / "pairs"
SPECS = Path(__file__).parents[1] / "specs"
NAMES = sorted(path.stem for path in DATA.glob("*.yaml"))
SOURCE, TARGET, VOCABULARY = (13, 9), (8, 11), 97  # lengths of the two where they are padded


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def routed_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """NLLB's experts as before transformers 5.

    Since then the router's one-hot mask is taken for indices of experts, so that a token meets
    experts 0 and 1 alone, whatever it chose.
    """

    def forward(self: Any, hidden: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        each = [self[f"expert_{e}"](hidden) * weights[:, e, None] for e in range(self.num_experts)]
        return torch.stack(each).sum(0)

    monkeypatch.setattr(NllbMoeExperts, "forward", forward)


def case(name: str) -> Any:
    return yaml.safe_load((DATA / f"{name}.yaml").read_text())


@functools.cache
def reference(name: str) -> Any:
    config = AutoConfig.for_model(name, **case(name)["config"])
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")
    randomize(model)
    for module in model.modules():
        if hasattr(module, "make_weights"):  # of positions, which are computed
            module.make_weights(*module.weights.shape, module.padding_idx)
    return model.eval()


@functools.cache
def emitted(name: str) -> Any:
    return moegen.module(case(name)["spec"])


@functools.cache
def saved(name: str) -> dict[str, Tensor]:
    return laid_out(reference(name))


def ours(name: str) -> Any:
    model = emitted(name).Model().eval()
    model.load_state_dict(to_moegen(name, saved(name)))
    return model


def batch(padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Source ids, labels, and which source ids are real; no id is the padding's or the start's."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (2, max(SOURCE)), generator=generator)
    labels = torch.randint(3, VOCABULARY, (2, max(TARGET)), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask = torch.arange(max(SOURCE)) < torch.tensor(SOURCE).unsqueeze(-1)
        real = torch.arange(max(TARGET)) < torch.tensor(TARGET).unsqueeze(-1)
        labels = labels.masked_fill(~real, -100)
    return ids, labels, mask


def expected_of(name: str, padded: bool) -> Any:
    ids, labels, mask = batch(padded)
    routers = {"output_router_logits": True} if name == "switch_transformers" else {}
    theirs = reference(name)
    return theirs(ids, attention_mask=mask.long(), labels=labels, use_cache=False, **routers)


# In transformers padding fills the capacity that a batch shares; that of a sequence it cannot.
PADDED = [(name, padded) for name in NAMES for padded in (False, True)]
PADDED.remove(("nllb-moe", True))


@pytest.mark.parametrize(("name", "padded"), PADDED)
def test_logits_and_losses(name: str, padded: bool) -> None:
    ids, labels, mask = batch(padded)
    model, expected = ours(name), expected_of(name, padded)
    with torch.no_grad():
        total, output = model.training_loss(ids, labels, mask)
    real = labels != -100
    close(output.logits[real], expected.logits[real], "logits")
    config = reference(name).config
    loss = expected.loss
    if name == "switch_transformers":
        z = config.router_z_loss_coef * (expected.encoder_z_loss + expected.decoder_z_loss)
        even = config.router_aux_loss_coef * (expected.encoder_aux_loss + expected.decoder_aux_loss)
        if not padded:  # transformers' losses count padding
            close(output.losses["z"], z, "z-loss")
            close(output.losses["balance"], even, "auxiliary loss")
        else:
            loss, total = loss - z - even, total - sum(output.losses.values())
    close(total, loss, "loss")


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_refused(name: str) -> None:
    if name == "t5":
        assert not hasattr(emitted(name), "Routing")
        return
    ids, labels, mask = batch(False)
    with torch.no_grad():
        routing = ours(name).training_loss(ids, labels, mask)[1].routing
    assert all(record.dropped > 0 for record in routing)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    ids, labels, mask = batch(False)
    model, theirs = ours(name), reference(name)
    theirs.zero_grad()
    expected_of(name, False).loss.backward()
    model.training_loss(ids, labels, mask)[0].backward()
    graded = copy.deepcopy(theirs)
    with torch.no_grad():
        for copied, original in zip(graded.parameters(), theirs.parameters(), strict=True):
            copied.copy_(original.grad if original.grad is not None else 0)
    wanted = to_moegen(name, laid_out(graded))
    for key, parameter in model.named_parameters():
        close(parameter.grad, wanted[key], f"gradient of {key}")
        if key.endswith("key_bias"):
            continue  # the same logit for all keys, so that its gradient is rounding alone
        error = (parameter.grad - wanted[key]).norm() / wanted[key].norm()
        assert error <= 1e-4, f"gradient of {key}: off by {error} of its norm"


@pytest.mark.parametrize("name", ["t5", "nllb-moe"])
def test_generation(name: str) -> None:
    """Greedy, and without a cache there."""
    model, theirs = ours(name), reference(name)
    ids, _, mask = batch(name == "t5")
    written = torch.full((2, 1), theirs.config.decoder_start_token_id)
    with torch.no_grad():
        for _ in range(2 if name == "nllb-moe" else 8):  # before a capacity refuses tokens
            out = theirs(
                ids, attention_mask=mask.long(), decoder_input_ids=written, use_cache=False
            )
            written = torch.cat([written, out.logits[:, -1:].argmax(-1)], 1)
    found = model.generate(ids, written.shape[1] - 1, mask)
    assert torch.equal(found, written[:, 1:])


@pytest.mark.parametrize("name", NAMES)
def test_weights_there_and_back(name: str) -> None:
    theirs = saved(name)
    converted = to_moegen(name, theirs)
    same(to_huggingface(name, converted), theirs)
    fresh = emitted(name).Model().state_dict()
    same(to_moegen(name, to_huggingface(name, fresh)), fresh)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_needed(name: str) -> None:
    theirs = saved(name)
    for convert, tensors in ((to_moegen, theirs), (to_huggingface, to_moegen(name, theirs))):
        for key in (k for k in tensors if not k.endswith("ffn.gate")):  # without it, not gated
            rest = {k: v for k, v in tensors.items() if k != key}
            with pytest.raises(ConversionError):
                convert(name, rest)
        with pytest.raises(ConversionError, match=r"extra is left over"):
            convert(name, {**tensors, "extra": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "spec"),
    [("switch_transformers", "hf-switch-base-8")],
)
def test_published_models_have_these_tensors(name: str, spec: str) -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model(
            name,
            d_ff=3072,
            num_sparse_encoder_layers=6,
            num_sparse_decoder_layers=6,
        )
        theirs = AutoModelForSeq2SeqLM.from_config(config).state_dict()
        model = moegen.module(SPECS / f"{spec}.yaml").Model()
    for tied in ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        del theirs[tied]
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in to_moegen(name, theirs).items()} == shapes
