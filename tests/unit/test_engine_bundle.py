"""Bundles: a round trip, refusal of other machines, and that nothing of a bad file is stored."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from trt_core import engine_bundle
from trt_core.engine_bundle import BUNDLE_SCHEMA, INDEX, export_bundle, import_bundle
from trt_core.engine_cache import EngineCache, EngineKey
from trt_core.engine_manifest import CODE_KIND, MANIFEST, sha256
from trt_core.errors import CacheError
from trt_core.gpu import environment

KEYS = [EngineKey("engine", {"segment": name}) for name in ("double_qkv", "single_out")]
FILES = {"engine.trt": bytes(range(256)) * 8, "plan.json": b"{}"}


@pytest.fixture
def source(tmp_path: Path) -> EngineCache:
    cache = EngineCache(tmp_path / "source")
    for key in KEYS:
        cache.put(key, FILES, {"segment": key.fields["segment"]})
    cache.update(KEYS[0], "runtime_cache.bin", b"kernels")
    return cache


@pytest.fixture
def target(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "target")


@pytest.fixture
def bundle(source: EngineCache, tmp_path: Path) -> Path:
    export_bundle(source, tmp_path / "flux.bundle")
    return tmp_path / "flux.bundle"


def contents(cache: EngineCache) -> dict[str, dict[str, bytes]]:
    found = {entry.digest: cache.get(entry.manifest.key) for entry in cache.entries(all_gpus=True)}
    return {
        digest: {name: entry.read(name) for name in entry.manifest.payloads} if entry else {}
        for digest, entry in found.items()
    }


def test_round_trip(source: EngineCache, target: EngineCache, bundle: Path) -> None:
    report = import_bundle(target, bundle)
    assert set(report.added) == {key.digest for key in KEYS}
    assert report.size_bytes == sum(entry.size_bytes for entry in source.entries())
    assert contents(target) == contents(source)
    assert {entry.info["segment"] for entry in target.entries()} == {"double_qkv", "single_out"}


def test_bundle_is_a_plain_zip(bundle: Path) -> None:
    with zipfile.ZipFile(bundle) as opened:
        assert opened.testzip() is None
        assert {info.compress_type for info in opened.infolist()} == {zipfile.ZIP_STORED}
        assert json.loads(opened.read(INDEX))["environment"] == environment()


def test_import_keeps_what_is_there(target: EngineCache, bundle: Path) -> None:
    target.put(KEYS[0], {"engine.trt": b"mine"}, {})
    report = import_bundle(target, bundle)
    assert (report.present, report.added) == ((KEYS[0].digest,), (KEYS[1].digest,))
    assert contents(target)[KEYS[0].digest] == {"engine.trt": b"mine"}
    assert import_bundle(target, bundle).added == ()


def test_export_of_chosen_entries(source: EngineCache, target: EngineCache, tmp_path: Path) -> None:
    assert export_bundle(source, tmp_path / "one", [KEYS[1].digest]).entries == 1
    assert import_bundle(target, tmp_path / "one").added == (KEYS[1].digest,)
    with pytest.raises(CacheError, match="has no engine ffff"):
        export_bundle(source, tmp_path / "none", [KEYS[1].digest, "f" * 64])
    assert not (tmp_path / "none").exists()


def test_code_stays_where_it_was_made(
    source: EngineCache, target: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither exported nor, from a bundle that holds it all the same, imported."""
    code = EngineKey(CODE_KIND, {"segment": "single_out"})
    source.put(code, {"code_000.bin": b"pickle"}, {})
    assert export_bundle(source, tmp_path / "bundle").entries == len(KEYS)
    with pytest.raises(CacheError, match=f"has no engine {code.digest}"):
        export_bundle(source, tmp_path / "code", [code.digest])
    target.put(code, {"code_000.bin": b"pickle"}, {})
    with pytest.raises(CacheError, match=r"holds Inductor's code alone.*can travel"):
        export_bundle(target, tmp_path / "alone")
    target.clear()
    with monkeypatch.context() as patched:
        patched.setattr(engine_bundle, "CODE_KIND", "none")
        export_bundle(source, tmp_path / "code", [code.digest])
    with pytest.raises(CacheError, match="is code that would run here, which no bundle of ours holds"):
        import_bundle(target, tmp_path / "code")
    assert not target.entries()


def test_nothing_to_export(target: EngineCache, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"no engine of this GPU and versions.*Make a picture"):
        export_bundle(target, tmp_path / "empty")


def test_export_replaces_only_bundles(source: EngineCache, bundle: Path, tmp_path: Path) -> None:
    before = bundle.read_bytes()
    export_bundle(source, bundle, [KEYS[0].digest])
    assert bundle.read_bytes() != before
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"photo")
    with pytest.raises(CacheError, match="not replaced"):
        export_bundle(source, photo)
    assert photo.read_bytes() == b"photo"
    with pytest.raises(CacheError, match="not replaced"):
        export_bundle(source, tmp_path)


def test_export_to_nowhere(source: EngineCache, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"cannot be written.*Choose a folder"):
        export_bundle(source, tmp_path / "missing" / "flux.bundle")


def test_damaged_entry_is_not_exported(source: EngineCache, tmp_path: Path) -> None:
    entry = source.get(KEYS[0])
    assert entry is not None
    (entry.path / "engine.trt").write_bytes(b"x" * len(FILES["engine.trt"]))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CacheError, match=r"cannot be exported.*sha256"):
        export_bundle(source, tmp_path / "flux.bundle")
    assert sorted(tmp_path.iterdir()) == before


def test_other_machine_is_refused_field_by_field(
    target: EngineCache, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file on a machine with other packages: their metadata is really there, in a site folder."""
    there = environment()
    for name in ("torch", "triton"):
        info = tmp_path / "site" / f"{name}-99.1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.1.0\n")
        (info / "top_level.txt").write_text(f"{name}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(CacheError) as caught:
        import_bundle(target, bundle)
    assert f"torch: bundle {there['torch']}, here 99.1.0" in str(caught.value)
    assert f"triton: bundle {there['triton']}, here 99.1.0" in str(caught.value)
    assert "gpu:" not in str(caught.value)
    assert not target.folder.exists()


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None], **options: int) -> None:
    """The bundle again, its members changed; `options` for `ZipFile`."""
    with zipfile.ZipFile(path) as opened:
        members = {name: opened.read(name) for name in opened.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", **options) as opened:
        for name, data in members.items():
            opened.writestr(name, data)


def change_index(path: Path, **changes: object) -> None:
    def change(members: dict[str, bytes]) -> None:
        members[INDEX] = json.dumps({**json.loads(members[INDEX]), **changes}).encode()

    rewrite(path, change)


def change_manifest(path: Path, **changes: object) -> None:
    """A manifest changed together with the hash in the list, as a forger would."""

    def change(members: dict[str, bytes]) -> None:
        index = json.loads(members[INDEX])
        name = f"{KEYS[1].digest}/{MANIFEST}"
        members[name] = json.dumps({**json.loads(members[name]), **changes}).encode()
        index["entries"][KEYS[1].digest] = sha256(members[name])
        members[INDEX] = json.dumps(index).encode()

    rewrite(path, change)


def put_member(path: Path, name: str, data: bytes = b"x") -> None:
    rewrite(path, lambda members: members.update({name: data}))


def twice(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as opened, pytest.warns(UserWarning, match="Duplicate"):
        opened.writestr(f"{KEYS[0].digest}/engine.trt", FILES["engine.trt"])


ENGINE = f"{KEYS[1].digest}/engine.trt"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "no bundle"),
    "not a zip": (lambda path: path.write_bytes(b"photo" * 1000), "no bundle"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-30]), "truncated"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "truncated"),
    "other zip": (lambda path: rewrite(path, lambda members: members.pop(INDEX)), "bundle.json"),
    "newer": (lambda path: change_index(path, schema=BUNDLE_SCHEMA + 1), "newer version of trt_core"),
    "other format": (lambda path: change_index(path, format="other"), "not a trt_core.bundle"),
    "no entries": (lambda path: change_index(path, entries={}), "list of engines"),
    "odd entries": (lambda path: change_index(path, entries=[1]), "list of engines"),
    "odd environment": (lambda path: change_index(path, environment={"gpu": 1}), "list of engines"),
    "unknown entry": (lambda path: change_index(path, entries={"../x": "0"}), "no item named"),
    "slip": (lambda path: put_member(path, "../evil.bin"), "evil.bin"),
    "absolute": (lambda path: put_member(path, "/tmp/evil.bin"), "evil.bin"),
    "drive": (lambda path: put_member(path, "C:\\evil.bin"), "evil.bin"),
    "slip in entry": (lambda path: put_member(path, f"{KEYS[0].digest}/../evil.bin"), "evil.bin"),
    "folder": (lambda path: put_member(path, f"{KEYS[0].digest}/", b""), "no file of a bundle"),
    "extra": (lambda path: put_member(path, f"{KEYS[0].digest}/extra.bin"), "does not name"),
    "twice": (twice, "twice"),
    "compressed": (
        lambda path: rewrite(path, dict.copy, compression=zipfile.ZIP_DEFLATED),
        "no description",
    ),
    "payload changed": (lambda path: put_member(path, ENGINE, b"y" * len(FILES["engine.trt"])), "sha256"),
    "payload short": (lambda path: put_member(path, ENGINE, b"y"), "has 1 bytes instead of 2048"),
    "payload missing": (lambda path: rewrite(path, lambda members: members.pop(ENGINE)), "lacks"),
    "manifest changed": (lambda path: put_member(path, f"{KEYS[1].digest}/{MANIFEST}"), "sha256"),
    "manifest of another engine": (lambda path: change_manifest(path, kind="plan"), "another engine"),
    "code": (lambda path: change_manifest(path, kind=CODE_KIND), "belongs to another engine"),
    "manifest newer": (lambda path: change_manifest(path, schema=99), "newer version"),
    "manifest escapes": (
        lambda path: change_manifest(path, payloads={"a": {"file": "../x", "size": 1, "sha256": ""}}),
        "garbles",
    ),
}


@pytest.mark.parametrize(("spoil", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_bundle_is_refused_with_its_reason(
    target: EngineCache, bundle: Path, tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    spoil(bundle)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CacheError, match="was not imported") as caught:
        import_bundle(target, bundle)
    assert reason in caught.value.what
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_bundle(target: EngineCache, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"cannot be read: No such file.*Check"):
        import_bundle(target, tmp_path / "none")


def test_any_flipped_bit_is_refused_or_harmless(source: EngineCache, target: EngineCache, bundle: Path) -> None:
    good, expected, chance, refused = bundle.read_bytes(), contents(source), random.Random(0), 0
    for _ in range(200):
        data = bytearray(good)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        bundle.write_bytes(data)
        try:
            import_bundle(target, bundle)
        except CacheError:
            refused += 1
            assert contents(target) == {}
        else:
            assert contents(target) == expected
            target.clear()
    assert refused > 150
