from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.check import ERROR, NOTE, WARNING, SourceCheck, check_source
from drtune_ray.data.kinds.recognize import open_images
from drtune_ray.data.pixels import decode
from drtune_ray.data.prepare import prepare_images
from drtune_ray.data.sources import read_bytes
from drtune_ray.display.images import check_facts, check_lines, check_page
from drtune_ray.errors import ConfigError
from tests.conftest import noise_image
from tests.data.pictures import ORIENTATION, exif
from tests.data.scans import splits_of


def check(root: Path) -> SourceCheck:
    return check_source(DataConfig(train=str(root)))


def texts(found: SourceCheck, level: str) -> list[str]:
    return [finding.text for finding in found.findings if finding.level == level]


def drawing(name: str) -> Image.Image:
    """A picture with large shapes, as photographs have."""
    return noise_image(name, 6).resize((96, 96), Image.Resampling.BICUBIC)


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for number in range(10):
            drawing(f"{label}{number}").save(root / label / f"{number}.png")
    return root


def test_check__a_sound_source(drawings: Path) -> None:
    found = check(drawings)
    assert found.findings == ()
    assert found.counts == {name: {"train": 6, "validation": 2, "test": 2} for name in found.counts}
    assert found.facts == {
        "smallest, median and largest size": "96x96, 96x96, 96x96",
        "modes": "RGB 20",
        "formats": "PNG 20",
    }
    lines = list(check_lines(found))
    assert lines[1].split() == ["class", "train", "validation", "test"]
    assert lines[-1] == "nothing to correct"
    assert not found.has_errors


def test_check__errors_are_all_found(drawings: Path) -> None:
    (drawings / "cat" / "0.png").write_bytes(b"")
    content = (drawings / "cat" / "1.png").read_bytes()
    (drawings / "cat" / "1.png").write_bytes(content[:-300])
    (drawings / "dog" / "text.png").write_text("<html>404</html>")
    os.mkfifo(drawings / "dog" / "pipe.png")
    (drawings / "dog" / "zero.png").symlink_to("/dev/zero")
    (drawings / "dog" / "loop").symlink_to(drawings / "dog")
    with (drawings / "dog" / "sparse.png").open("wb") as file:
        file.truncate(2**40)
    found = check(drawings)
    assert found.has_errors
    assert [text.partition("images/")[2].partition(":")[0] for text in texts(found, ERROR)] == [
        "cat/0.png cannot be decoded as an image (not recognised as an image)",
        "cat/1.png cannot be decoded as an image (image file is truncated)",
        "dog/pipe.png cannot be read (not a regular file)",
        "dog/sparse.png cannot be read (1024.0 GiB, but a file may take 1 GiB)",
        "dog/text.png cannot be decoded as an image (not recognised as an image)",
        "dog/zero.png cannot be read (not a regular file)",
    ]


def test_check__pictures_that_look_alike(drawings: Path) -> None:
    again = Image.open(drawings / "cat" / "0.png").resize((80, 80))
    again.save(drawings / "dog" / "similar.jpg", quality=80)
    (pair,) = (t for t in texts(check(drawings), WARNING) if "different classes" in t)
    assert pair == (
        "1 pair of pictures that look alike (cat/0.png ~ dog/similar.jpg) have different classes: "
        "one label may be wrong"
    )


def test_check__leakage_between_given_splits(drawings: Path, tmp_path: Path) -> None:
    shutil.copytree(drawings, tmp_path / "splits" / "train")
    for name in ("val", "test"):
        for label in ("cat", "dog"):
            (tmp_path / "splits" / name / label).mkdir(parents=True)
            drawing(name + label).save(tmp_path / "splits" / name / label / "own.png")
    shutil.copy(drawings / "cat" / "0.png", tmp_path / "splits" / "test" / "cat")
    again = Image.open(drawings / "dog" / "0.png").convert("RGB")
    again.save(tmp_path / "splits" / "val" / "dog" / "again.jpg", quality=70)
    found = check(tmp_path / "splits")
    assert "1 picture is in several given splits" in "\n".join(texts(found, NOTE))
    (leak,) = (t for t in texts(found, WARNING) if "different splits" in t)
    assert "train/dog/0.png" in leak and "val/dog/again.jpg" in leak


def test_check__turned_animated_and_alike_by_name(drawings: Path) -> None:
    drawing("turned").save(drawings / "cat" / "t.jpg", exif=exif(ORIENTATION))
    frames = [drawing(str(number)) for number in range(3)]
    frames[0].save(drawings / "cat" / "a.gif", save_all=True, append_images=frames[1:])
    shutil.copytree(drawings / "dog", drawings / "Dog ")
    found = "\n".join(texts(check(drawings), WARNING))
    assert "1 of 32 pictures are turned upright by their EXIF orientation (cat/t.jpg)" in found
    assert "1 of 32 pictures are animated or of several pages" in found
    assert "the classes 'Dog ' and 'dog' differ in case or spaces only" in found
    assert "10 pictures lie in several classes" in found


def test_check__page_holds_its_pictures(drawings: Path) -> None:
    (drawings / "<b>&").mkdir()
    drawing("x").save(drawings / "<b>&" / '"0".png')
    page = check_page(check(drawings))
    assert page.count('src="data:image/jpeg;base64,') == 21
    assert "http" not in page and "<script" not in page
    assert "<b>&<" not in page and "&lt;b&gt;&amp;" in page
    assert 'title="&lt;b&gt;&amp;/&quot;0&quot;.png"' in page


def test_check__as_plain_values(drawings: Path) -> None:
    (drawings / "cat" / "0.png").write_bytes(b"")
    facts = check_facts(check(drawings))
    (finding,) = facts["findings"]
    assert (finding["level"], finding["pictures"]) == ("error", ["cat/0.png"])
    assert facts["classes"]["cat"] == {"train": 5, "validation": 2, "test": 2}


# ---- prepare


def test_prepare__same_images_same_bytes_and_splits(drawings: Path, tmp_path: Path) -> None:
    manifest = prepare_images(DataConfig(train=str(drawings)), tmp_path / "a")
    drawings.rename(tmp_path / "moved")
    prepare_images(DataConfig(train=str(tmp_path / "moved")), tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["manifest.json", *(f"{s}-00000-of-00001.parquet" for s in ORDER)]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    before, after = splits_of(tmp_path / "moved"), splits_of(tmp_path / "a")
    assert after.content_digest() == before.content_digest() == manifest["content"]
    reader = open_images(DataConfig(train=str(tmp_path / "a")))
    contents = {read_bytes(reader, row) for row in after.manifest.to_pylist()}
    assert contents == {path.read_bytes() for path in (tmp_path / "moved").glob("*/*")}


ORDER = ("test", "train", "validation")


@pytest.mark.filterwarnings("ignore")  # of `datasets` and what it imports
def test_prepare__datasets_and_pandas_read_it(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    prepare_images(DataConfig(train=str(drawings)), tmp_path / "out")
    found = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache")
    )
    assert {split: len(rows) for split, rows in found.items()} == {
        "train": 12,
        "validation": 4,
        "test": 4,
    }
    assert found["train"].features["label"].names == ["cat", "dog"]
    picture = found["train"][0]["image"]
    frame = pandas.read_parquet(tmp_path / "out" / "train-00000-of-00001.parquet")
    assert picture.convert("RGB").tobytes() == decode(frame["image"][0]["bytes"]).tobytes()
    assert Image.open(io.BytesIO(frame["image"][0]["bytes"])).size == (96, 96)


def test_prepare__nothing_half_written(drawings: Path, tmp_path: Path) -> None:
    (drawings / "cat" / "0.png").write_bytes(b"")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError):
        prepare_images(DataConfig(train=str(drawings)), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
