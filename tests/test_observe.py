"""Watching routed layers: values, nothing that waits for the device, and safe output."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import made, token_ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moegen.emit import files
from moegen.emit.runtime.language_model import LanguageModel
from moegen.emit.runtime.network import load_statistics
from moegen.errors import MoegenError
from moegen.observe import Recorder
from moegen.observe.history import collapsed

HOSTILE = "</script><img src=x onerror=alert(1)>&\"'@@data@@\x1b[31m\u2028\ud800"


def record(load: list[int], entropy: float | None = None, **losses: float) -> Any:
    """What a routed layer hands on; entropy only where there is one."""
    fields: dict[str, Any] = {} if entropy is None else {"entropy": torch.tensor(entropy)}
    return SimpleNamespace(
        load=torch.tensor(load),
        dropped=torch.tensor(0.125),
        probability=torch.ones(len(load)) / len(load),
        losses={name: torch.tensor(value) for name, value in losses.items()},
        **fields,
    )


def filled(steps: int = 4, **options: Any) -> Recorder:
    """A recorder of two layers, of 4 and 8 experts; the second has collapsed."""
    recorder = Recorder(**options)
    for step in range(1, steps + 1):
        layers = [record([4, 4, 7, 1], 1.25, z=0.5), record([900, 0, 0, 0, 0, 0, 0, 0], z=0.25)]
        losses = {"balance": torch.tensor(0.5)}
        recorder.record(step, layers, losses=losses, loss=torch.tensor(2.0 + step))
    return recorder


def printed(recorder: Recorder, layers: int | None = None, width: int = 140) -> str:
    screen = Console(file=io.StringIO(), width=width, color_system=None)
    screen.print(recorder.table(layers))
    return screen.file.getvalue()  # type: ignore[attr-defined,no-any-return]


class NoWaiting(TorchDispatchMode):
    """Refuses whatever would make the host wait for a device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        assert not any(word in str(func) for word in ("_local_scalar", "nonzero", "is_nonzero"))
        devices = {v.device for v in args if isinstance(v, Tensor) and v.ndim}
        devices |= {(kwargs or {}).get("device") or device for device in devices}
        assert len(devices) <= 1, func
        return func(*args, **(kwargs or {}))


# Statistics in packages


@pytest.mark.parametrize(
    ("load", "values"),
    [
        ([4, 4, 7, 1], (1.75, 0.25, 0.28125, 0.88589, 0)),
        ([3, 3, 3], (1, 1, 0, 1, 0)),
        ([8, 0], (2, 0, 1, 0, 1)),
        ([0, 0, 0], (0, 0, 0, 0, 3)),
        ([5], (1, 1, 0, 1, 0)),
        ([0], (0, 0, 0, 0, 1)),
    ],
)
def test_statistics_of_a_load(load: list[int], values: tuple[float, ...]) -> None:
    found = load_statistics(torch.tensor(load))
    names = ("max_over_mean", "min_over_mean", "cv2", "normalised_entropy", "unused")
    assert tuple(found) == names
    assert [v.item() for v in found.values()] == pytest.approx(list(values), abs=1e-5)
    both = load_statistics(torch.tensor([load, load]).double())
    assert all(torch.allclose(both[n][1].float(), found[n].float()) for n in names)


def test_statistics_are_one_graph_and_stay_on_the_device() -> None:
    whole = torch.compile(load_statistics, fullgraph=True, backend="eager")
    assert whole(torch.tensor([4, 4, 7, 1]))["max_over_mean"] == 1.75
    found = load_statistics(torch.zeros(7, dtype=torch.int64, device="meta"))
    assert all(value.is_meta and value.shape == () for value in found.values())


@pytest.mark.parametrize("name", ["overrides", "switch-like", "expert-choice"])
def test_a_package_has_statistics_of_its_routed_layers(name: str) -> None:
    model = made(name)
    routing = model(token_ids()).routing
    found = model.statistics(routing)
    assert len(model.routed_layers()) == len(routing) == len(found) > 0
    for layer, values in zip(routing, found, strict=True):
        assert values["max_over_mean"] == layer.load.max() / layer.load.float().mean()
        assert values["dropped"] == layer.dropped
        assert ("router_entropy" in values) == hasattr(layer, "entropy")
        assert not any(value.requires_grad for value in values.values())


def test_statistics_take_records_with_and_without_entropy() -> None:
    with_it, without = LanguageModel.statistics([record([1, 2], 0.5), record([1])])
    assert with_it["router_entropy"] == 0.5
    assert "router_entropy" not in without


# Recording


def test_recording_waits_for_nothing() -> None:
    """On meta tensors, whose values nobody can have, and under a mode that sees every call."""
    recorder = Recorder(most=4)
    with torch.device("meta"):
        layers = [record([0] * 4, 0.0, z=0.0), record([0] * 6)]
        losses = {"z": torch.zeros(())}
    with NoWaiting():
        for step in range(20):
            for _ in range(2):
                recorder.record(step, layers, losses=losses, loss=0.5)
        with pytest.raises(AssertionError):
            recorder.table()
    with pytest.raises(NotImplementedError, match="meta"):
        recorder.table()


def test_recording_follows_no_gradient_and_keeps_no_alias() -> None:
    recorder, load = Recorder(), torch.tensor([1, 3])
    loss = torch.tensor(2.0, requires_grad=True)
    layer = SimpleNamespace(load=load, dropped=torch.zeros(()), losses={"z": loss * 2})
    recorder.record(1, [layer], loss=loss)
    load.zero_()  # as a captured graph does in its next run
    history = recorder.history()
    assert history.layers[0].load.tolist() == [[1, 3]]
    assert history.layers[0].losses == {"z": [4.0]}
    assert history.loss == [2.0]


def test_all_steps_reach_the_host_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, moves, real = filled(50), [], Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: moves.append(self.shape) or real(self))
    recorder.table()
    recorder.history()
    assert len(moves) == 1
    recorder.record(51, [record([1] * 4, 1.0, z=0.0), record([1] * 8, z=0.0)])
    recorder.history()
    assert len(moves) == 2
    assert moves[1] < moves[0]


@pytest.mark.parametrize("most", [2, 9, 10])
@pytest.mark.parametrize("steps", [1, 9, 10, 11, 100])
def test_of_many_steps_even_ones_are_kept_and_the_newest(most: int, steps: int) -> None:
    kept = filled(steps, most=most).history().steps
    assert len(kept) <= most
    assert (kept[0], kept[-1]) == (1, steps)
    gaps = {b - a for a, b in pairwise(kept[:-1])}
    assert len(gaps) <= 1
    assert len(kept) >= min(steps, most // 2)


def test_micro_batches_of_a_step_are_one() -> None:
    recorder = Recorder()
    recorder.record(1, [record([1, 3], z=1.0)], loss=1.0)
    recorder.table()  # what is on the host already takes another
    recorder.record(1, [record([2, 0], z=2.0)], loss=2.0)
    recorder.record(2, [record([5, 5], z=5.0)], loss=5.0)
    history = recorder.history()
    assert history.steps == (1, 2)
    assert history.layers[0].load.tolist() == [[3, 3], [5, 5]]
    assert history.layers[0].losses["z"] == [1.5, 5.0]
    assert history.loss == [1.5, 5.0]


def test_what_comes_and_goes_leaves_a_gap() -> None:
    recorder = Recorder()
    recorder.record(1, [record([1, 3], 0.5, z=1.0)], loss=1.0)
    recorder.record(2, [record([1, 3])], losses={"balance": 2.0})
    history = recorder.history()
    assert history.loss == [1.0, None]
    assert history.losses == {"balance": [None, 2.0]}
    assert history.layers[0].losses == {"z": [1.0, None]}
    assert history.layers[0].statistics["router_entropy"] == [0.5, None]


def test_misuse_is_a_sentence(tmp_path: Path) -> None:
    empty = Recorder()
    for show in (empty.table, empty.history, empty.show):
        with pytest.raises(MoegenError, match="nothing has been recorded yet; call recorder"):
            show()
    with pytest.raises(MoegenError, match="nothing has been recorded"):
        empty.to_html(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
    recorder = filled(3)
    with pytest.raises(MoegenError, match=r"\[4, 8\] experts in its layers, now \[4\]"):
        recorder.record(4, [record([1, 1, 1, 1])])
    layers = [record([1] * 4), record([1] * 8)]
    with pytest.raises(MoegenError, match="step 3 already, so not step 2"):
        recorder.record(2, layers)
    with pytest.raises(MoegenError, match="other losses of step 3"):
        recorder.record(3, layers)
    with pytest.raises(MoegenError, match="1 names were given, but 2 layers are routed"):
        Recorder(["only"]).record(1, layers)
    with pytest.raises(MoegenError, match="cannot write"):
        recorder.to_json(tmp_path / "none" / "x.json")


# Collapse, and the table


def test_collapse_is_what_chance_does_not_explain() -> None:
    torch.manual_seed(0)
    even = torch.stack([torch.randint(256, (n,)).bincount(minlength=256) for n in [16, 256, 9999]])
    assert not collapsed(even.double()).any()
    assert not collapsed(torch.zeros(1, 8).double()).any()
    assert not collapsed(torch.tensor([[100.0]])).any()
    for load in ([100, 0], [50, 50, 0, 0], [96, 0, 0, 0, 0, 0, 0, 4], [50, 50, 0]):
        assert collapsed(torch.tensor([load]).double()).all(), load


def test_a_collapsed_layer_stands_out() -> None:
    text = printed(filled(layers=["first", "second"])).splitlines()
    assert text[0] == "step 4: loss 6, balance 0.5"
    first, second = text[-2:]
    assert "COLLAPSED" in second
    assert "COLLAPSED" not in first
    for cell in ("1.75", "0.28", "0.886", " 0 ", "12.5%", "1.25", "0.5"):
        assert cell in first
    for cell in ("8.00", "7.00", "0.000", " 7 ", " - "):
        assert cell in second
    texts = [printed(filled(), width=width).replace("─", "") for width in (140, 80, 40, 24)]
    assert len({frozenset(text.split()) for text in texts}) == 1  # what does not fit stands below
    one = printed(filled(layers=["first", "second"]), 1)
    assert "second" in one
    assert "first" not in one
    assert "(the 1 least even of 2 layers)" in one


def test_a_table_without_collapse_has_no_alarm_and_shows_what_is_not_a_number() -> None:
    recorder = Recorder(["\x1b[31mred"])
    recorder.record(7, [record([5, 5], **{"\x1b]0;z": math.nan})], loss=torch.tensor(math.inf))
    text = printed(recorder)
    assert "step 7: loss inf" in text
    assert "nan" in text
    assert "COLLAPSED" not in text
    assert "\x1b" not in text


def test_a_live_table_is_redrawn() -> None:
    screen = Console(file=io.StringIO(), width=120, height=20, force_terminal=True)
    recorder = Recorder()
    with recorder.live(every=3, screen=screen):
        for step in range(1, 9):
            recorder.record(step, [record([step, 1])])
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    shown = [n for n in range(1, 9) if f"step {n}" in text]
    assert shown == [3, 6, 8]
    before = len(text)
    recorder.record(9, [record([9, 1])])
    assert len(screen.file.getvalue()) == before  # type: ignore[attr-defined]


# Files and TensorBoard


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.tags[-1][0] if self.tags else "", []).append(data)

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.texts["script"][0])  # type: ignore[no-any-return]


def test_a_page_is_one_file_that_opens_nothing(tmp_path: Path) -> None:
    place = filled(30).to_html(tmp_path / "page.html")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    text = place.read_text(encoding="utf-8")
    page = Page(text)
    for opens in ("http:", "https:", "url(", "@import", "fetch(", "XMLHttp", "innerHTML", "eval("):
        assert opens not in text
    assert not [tag for tag, found in page.tags if {"src", "href", "srcset"} & found.keys()]
    assert "default-src 'none'" in text
    assert page.data["steps"] == list(range(1, 31))
    assert page.data["loss"][-1] == 32
    layer, other = page.data["layers"]
    assert layer["load"] == [[4, 4, 7, 1]] * 30
    assert layer["statistics"]["normalised_entropy"][0] == 0.88589
    assert other["experts"] == 8
    assert other["collapsed"] == [True] * 30
    rows = [found.get("class") for tag, found in page.tags if tag == "tr"]
    assert rows == [None, None, "collapsed"]  # readable without the script, too


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    recorder = Recorder([HOSTILE])
    layer = record([1, 2], **{HOSTILE: 0.5})
    recorder.record(1, [layer], losses={HOSTILE: torch.tensor(math.nan)}, loss=1.0)
    plain = Recorder()
    plain.record(1, [record([1, 2], z=0.5)], losses={"z": 1.0}, loss=1.0)
    page = Page(recorder.to_html(tmp_path / "a.html", title=HOSTILE).read_text(encoding="utf-8"))
    usual = Page(plain.to_html(tmp_path / "b.html").read_text(encoding="utf-8"))
    assert page.tags == usual.tags
    assert "\x1b" not in "".join(page.texts["td"] + page.texts["h1"])
    assert page.data["layers"][0]["name"] == HOSTILE
    assert page.data["losses"] == {HOSTILE: [None]}
    assert "".join(page.texts["h1"]).startswith("</script><img src=x")


def test_large_pages_leave_out_experts_of_some_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moegen.observe.page._CELLS", 12 * 5)
    page = Page(filled(30).to_html(tmp_path / "page.html").read_text(encoding="utf-8"))
    detailed = page.data["detailed"]
    assert len(detailed) == 5
    assert (detailed[0], detailed[-1]) == (0, 29)
    assert [len(layer["load"]) for layer in page.data["layers"]] == [5, 5]
    assert len(page.data["layers"][0]["statistics"]["cv2"]) == 30


def test_a_page_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = filled(2).to_html(tmp_path / "page.html")
    before = place.read_text(encoding="utf-8")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fdopen", full)
    with pytest.raises(MoegenError, match="No space left on device"):
        filled(3).to_html(place)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert place.read_text(encoding="utf-8") == before


# Stands in for a browser: elements that remember, and a pen that counts.
BROWSER = """
let painted = 0;
const pen = new Proxy({}, {
  get: (_, key) => (key === "measureText" ? () => ({width: 9}) : key === "fillRect"
    ? (...box) => { painted++; if (!box.every(Number.isFinite)) throw Error(`fillRect ${box}`); }
    : () => {}),
  set: () => true,
});
const elements = {};
const element = (id) => elements[id] ??= {style: {}, clientWidth: 600, getContext: () => pen,
  append(option) { this.value ??= option.value; (this.all ??= []).push(option.value); }};
global.document = {getElementById: element, documentElement: {}};
global.getComputedStyle = () => ({getPropertyValue: () => " #123456 "});
global.matchMedia = () => ({matches: false});
global.window = global;
global.Option = function (text, value) { this.value = value; };
"""
READER = """
for (const value of elements.statistic.all) {
  elements.statistic.value = value;
  elements.statistic.onchange();
}
elements["layers-map"].onmousemove({offsetX: 599, offsetY: 30});
elements["layers-lines"].onmousemove({offsetX: 599, offsetY: 30});
elements.step.value = "0";
elements.step.oninput();
elements["experts-map"].onmousemove({offsetX: 66, offsetY: 30});
console.log(JSON.stringify([painted > 100, elements.statistic.all.length,
  ...["layers-note", "lines-note", "step-note", "experts-note"].map((i) => elements[i].textContent)
]));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node to run the page's script")
def test_the_script_of_a_page_runs(tmp_path: Path) -> None:
    page = Page(filled(5, layers=["a", "b"]).to_html(tmp_path / "p.html").read_text("utf-8"))
    data, script = page.texts["script"][0], "".join(page.texts["script"][1:])
    fed = f"element('data').textContent = {json.dumps(data)};\n"
    code = BROWSER + fed + script + READER
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        *(True, 8),
        "layer b, step 5: 0.25, collapsed",
        "layer a, step 5: 0.5",
        "1",
        "layer b, expert 0: 900 choices, 8.00 of the mean",
    ]


def test_json_has_everything_and_is_valid(tmp_path: Path) -> None:
    recorder = filled(2)
    layers = [record([4, 4, 7, 1], 1.0, z=0.5), record([1] * 8, z=math.nan)]
    recorder.record(3, layers, loss=math.inf)
    text = recorder.to_json(tmp_path / "routing.json").read_text(encoding="utf-8")
    data = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert data["steps"] == [1, 2, 3]
    assert data["loss"] == [3.0, 4.0, None]
    assert data["losses"] == {"balance": [0.5, 0.5, None]}
    first, second = data["layers"]
    assert (first["name"], first["experts"], second["experts"]) == ("1", 4, 8)
    assert first["statistics"]["cv2"] == [0.28125] * 3
    assert first["statistics"]["dropped"] == [0.125] * 3
    assert second["losses"] == {"z": [0.25, 0.25, None]}
    assert second["load"][2] == [1] * 8
    assert second["collapsed"] == [True, True, False]


class Scalars:
    """A writer as TensorBoard's is."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        assert (tag, global_step) not in self.found
        self.found[tag, global_step] = scalar_value


def test_scalars_go_to_any_writer_and_only_once() -> None:
    recorder, writer = filled(2), Scalars()
    recorder.to_tensorboard(writer)
    assert writer.found["cv2/layer 1", 2] == 0.28125
    assert writer.found["loss/total", 1] == 3.0
    assert writer.found["loss/balance", 1] == 0.5
    assert writer.found["z of layers/layer 2", 1] == 0.25
    assert writer.found["collapsed/layer 2", 2] == 1
    assert ("router_entropy/layer 1", 1) in writer.found
    assert ("router_entropy/layer 2", 1) not in writer.found
    count = len(writer.found)
    recorder.record(3, [record([1] * 4, 1.0, z=0.5), record([1] * 8, z=0.5)], loss=1.0)
    recorder.to_tensorboard(writer)
    assert {step for _, step in list(writer.found)[count:]} == {3}
    other = Scalars()
    recorder.to_tensorboard(other)
    assert len(other.found) == len(writer.found)


def test_without_tensorboard_a_folder_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MoegenError, match="not installed here; pip install tensorboard"):
        filled().to_tensorboard(tmp_path)
    with pytest.raises(MoegenError, match="has no add_scalar"):
        filled().to_tensorboard(object())  # type: ignore[arg-type]


# With packages


@pytest.mark.parametrize("name", ["overrides", "deepseek-v3-like", "bf16"])
def test_training_of_a_package_is_recorded(name: str, tmp_path: Path) -> None:
    model = made(name).train()
    recorder = Recorder(model.routed_layers())
    for step in range(3):
        loss, output = model.training_loss(token_ids())
        loss.backward()
        recorder.record(step, output.routing, losses=output.losses, loss=loss)
    history = recorder.history()
    assert [int(layer.name) for layer in history.layers] == model.routed_layers()
    for layer, last in zip(history.layers, output.routing, strict=True):
        assert layer.load[-1].tolist() == last.load.tolist()
        assert layer.losses.keys() == last.losses.keys()
    assert history.loss[-1] == loss.item()
    assert f"step 2: loss {loss.item():.4g}" in printed(recorder)
    assert Page(recorder.to_html(tmp_path / "p.html").read_text("utf-8")).data["steps"] == [0, 1, 2]


def test_a_model_without_routing_has_losses_alone(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.record(1, (), loss=torch.tensor(2.5))
    assert "step 1: loss 2.5" in printed(recorder)
    assert Page(recorder.to_html(tmp_path / "p.html").read_text("utf-8")).data["layers"] == []


def test_the_command_does_not_load_it() -> None:
    code = (
        "import sys, moegen.cli; from click.testing import CliRunner;"
        "assert CliRunner().invoke(moegen.cli.cli, ['--help']).exit_code == 0;"
        "sys.exit(any(m in sys.modules for m in ('moegen.observe', 'torch')))"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
