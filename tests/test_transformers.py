"""Emitted models against transformers' own: values, gradients, decoding and weights."""

import copy
import functools
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import moegen
from moegen.convert import FAMILIES, ConversionError, to_huggingface, to_moegen

DATA = Path(__file__).parent / "data" / "transformers"
NAMES = sorted(path.stem for path in DATA.glob("*.yaml"))
WITH_AUXILIARY = [name for name in NAMES if "losses" in (DATA / f"{name}.yaml").read_text()]
LENGTHS = (13, 9)  # of the two sequences where one is padded
TOLERANCE = 1e-5


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def close(ours, theirs, what):
    """At most TOLERANCE of the reference's largest value, or of 1."""
    assert ours.shape == theirs.shape, what
    scale = max(1.0, theirs.abs().max().item())
    difference = (ours - theirs).abs().max().item()
    assert difference <= TOLERANCE * scale, f"{what}: {difference} of {scale}"


@torch.no_grad()
def randomize(model):
    """Values that no part of a model may leave out: nothing is zero or one."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("inv_freq"):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            tensor.copy_(1 + 0.3 * noise)
        elif name.endswith("correction_bias"):
            tensor.copy_(0.1 * noise)
        elif name.endswith(("bias", "sinks")):
            tensor.copy_(2 * noise)
        else:
            tensor.copy_(0.2 * noise)


@functools.cache
def reference(name):
    case = yaml.safe_load((DATA / f"{name}.yaml").read_text())
    # No token is special: a padding id would have no gradient.
    special = {f"{which}_token_id": None for which in ("pad", "bos", "eos")}
    config = AutoConfig.for_model(name, **case["config"], **special)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomize(model)
    return model


@functools.cache
def emitted(name):
    case = yaml.safe_load((DATA / f"{name}.yaml").read_text())
    return moegen.module(case["spec"])


def laid_out(model):
    """The state dict as `save_pretrained` lays it out in a file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


@functools.cache
def saved(name):
    return laid_out(reference(name))


def gradients(name):
    """The gradients of the reference, laid out as weights are."""
    model = copy.deepcopy(reference(name))
    with torch.no_grad():
        for copied, original in zip(model.parameters(), reference(name).parameters(), strict=True):
            copied.copy_(original.grad)
    return laid_out(model)


def ours(name):
    model = emitted(name).Model()
    model.load_state_dict(to_moegen(name, saved(name)))
    return model


def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(97, (2, LENGTHS[0]), generator=generator)
    mask = torch.arange(LENGTHS[0]) < torch.tensor(LENGTHS).unsqueeze(-1)
    return ids, mask


def records_routers(theirs, ids):
    """Whether transformers has the auxiliary loss; granitemoe of 5.17 records no router."""
    with torch.no_grad():
        return bool(theirs(ids, use_cache=False, output_router_logits=True).router_logits)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name, padded):
    theirs, model = reference(name), ours(name)
    ids, mask = batch()
    mask = mask if padded else None
    labels = ids if mask is None else ids.masked_fill(~mask, -100)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    balanced = name in WITH_AUXILIARY and records_routers(theirs, ids)
    assert balanced or name == "granitemoe" or name not in WITH_AUXILIARY
    options = {"output_router_logits": True} if balanced else {}
    given = None if mask is None else mask.long()
    expected = theirs(ids, attention_mask=given, labels=labels, use_cache=False, **options)

    total, output = model.training_loss(ids, mask)

    if name in WITH_AUXILIARY and not balanced:
        total = total - output.losses["balance"]
    close(output.logits[real], expected.logits[real], "logits")
    close(total, expected.loss, "loss")
    if balanced:
        weight = theirs.config.router_aux_loss_coef
        close(output.losses["balance"] / weight, expected.aux_loss, "auxiliary loss")
        language = expected.loss - weight * expected.aux_loss
        close(model.loss(output.logits, labels), language, "language-model loss")
    elif name not in WITH_AUXILIARY:
        assert output.losses == {}

    theirs.zero_grad()
    expected.loss.backward()
    total.backward()
    wanted = to_moegen(name, gradients(name))
    for key, parameter in model.named_parameters():
        close(parameter.grad, wanted[key], f"gradient of {key}")
        error = (parameter.grad - wanted[key]).norm() / wanted[key].norm()
        assert error <= 1e-4, f"gradient of {key}: off by {error} of its norm"


@pytest.mark.parametrize("name", NAMES)
def test_decoding(name):
    theirs, model = reference(name), ours(name)
    ids, _ = batch()
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
        one_by_one = model.new_cache(*ids.shape)
        for i in range(ids.shape[1]):
            logits = model.step(ids[:, i : i + 1], torch.tensor(i), one_by_one)
            close(logits[:, 0], expected[:, i], f"position {i}")
        cache = model.new_cache(*ids.shape)
        for start, stop in ((0, 7), (7, 8), (8, 13)):
            logits = model.step(ids[:, start:stop], torch.tensor(start), cache)
            close(logits, expected[:, start:stop], f"positions {start} to {stop}")


def same(ours, theirs):
    """The same names, shapes, formats and bits."""
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_weights_there_and_back(name):
    theirs = saved(name)
    converted = to_moegen(name, theirs)
    same(to_huggingface(name, converted), theirs)
    fresh = emitted(name).Model().state_dict()
    same(to_moegen(name, to_huggingface(name, fresh)), fresh)


@pytest.mark.parametrize("name", NAMES)
def test_weights_in_memory(name):
    held = reference(name).state_dict()
    if reference(name).config.tie_word_embeddings:
        del held["lm_head.weight"]
    same(to_moegen(name, held), to_moegen(name, saved(name)))


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_needed(name):
    theirs = saved(name)
    converted = to_moegen(name, theirs)
    optional = {"lm_head.weight", "head"}
    for convert, tensors in ((to_moegen, theirs), (to_huggingface, converted)):
        for key in tensors.keys() - optional:
            rest = {k: v for k, v in tensors.items() if k != key}
            with pytest.raises(ConversionError):
                convert(name, rest)
        with pytest.raises(ConversionError, match=r"layers\.1\.extra is left over"):
            convert(name, {**tensors, "layers.1.extra": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "spec"),
    # The defaults of transformers' configs are these models.
    [("mixtral", "mixtral-8x7b"), ("deepseek_v3", "deepseek-v3"), ("gpt_oss", "gpt-oss-120b")],
)
def test_published_models_have_these_tensors(name, spec):
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(name)).state_dict()
        model = moegen.module(Path(__file__).parents[1] / "specs" / f"{spec}.yaml").Model()
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in to_moegen(name, theirs).items()} == shapes


def test_every_family_has_a_case():
    assert sorted(FAMILIES) == sorted(path.stem for path in DATA.rglob("*.yaml"))
