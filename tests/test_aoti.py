"""Packages on disk: whose they are, whether they belong, and that nothing else is ever loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fluxfast import aoti
from fluxfast.aoti import Package, _write_atomically, belongs, capture_examples, describe, make_package, private_folder
from fluxfast.errors import PackageError
from fluxfast.levels import get_level

LEVEL = get_level("aoti")
EXAMPLE = ((torch.ones(2, 4),), {})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("shift", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu() + self.shift


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval().requires_grad_(False)


def test_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    """Whatever the umask, nobody else can write native code where it is loaded from; a second call agrees."""
    private_folder(tmp_path / "new")
    private_folder(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_folder_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    """The error says how to make it private."""
    os.chmod(tmp_path, mode)
    with pytest.raises(PackageError, match=rf"writable by others.*chmod 700 {tmp_path}"):
        private_folder(tmp_path)


def test_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    """A link could be pointed elsewhere after the check."""
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(PackageError, match="is a link"):
        private_folder(tmp_path / "link")


IDENTITY = {"region": "double", "versions": {"torch": "2.13.0"}, "level": {"dtype": "bfloat16"}, "arguments": [[1, 2]]}


def stored(folder: Path) -> tuple[Path, Path]:
    """A package and its manifest, as `make_package` leaves them."""
    import hashlib

    package, manifest = folder / "double.pt2", folder / "double.manifest.json"
    package.write_bytes(b"native code " * 100)
    sha256 = hashlib.sha256(package.read_bytes()).hexdigest()
    _write_atomically(manifest, IDENTITY | {"sha256": sha256, "size": package.stat().st_size})
    return package, manifest


def test_untouched_package_belongs(tmp_path: Path) -> None:
    """The control of the refusals below."""
    assert belongs(*stored(tmp_path), IDENTITY)


@pytest.mark.parametrize("position", [0, 555, -1])
def test_one_changed_byte_is_noticed(tmp_path: Path, position: int) -> None:
    """The hash is over every byte."""
    package, manifest = stored(tmp_path)
    content = bytearray(package.read_bytes())
    content[position] ^= 1
    package.write_bytes(content)
    assert not belongs(package, manifest, IDENTITY)


@pytest.mark.parametrize("key", [*IDENTITY, "sha256", "size"])
@pytest.mark.parametrize("change", ["other", "missing"])
def test_one_changed_line_of_the_manifest_is_noticed(tmp_path: Path, key: str, change: str) -> None:
    """Every line has to be right; one that is gone is as wrong as one that differs."""
    package, manifest = stored(tmp_path)
    content = json.loads(manifest.read_text())
    content.pop(key) if change == "missing" else content.update({key: "other"})
    manifest.write_text(json.dumps(content))
    assert not belongs(package, manifest, IDENTITY)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b'"text"', b"\xff\xfe", b"[" * 100_000])
def test_broken_manifest_is_false_and_no_error(tmp_path: Path, content: bytes) -> None:
    """Anything else than the right manifest means: build it again."""
    package, manifest = stored(tmp_path)
    manifest.write_bytes(content)
    assert not belongs(package, manifest, IDENTITY)


@pytest.mark.parametrize("missing", [0, 1])
def test_missing_file_is_false_and_no_error(tmp_path: Path, missing: int) -> None:
    """A package without its manifest was never finished; a manifest without its package is nothing."""
    files = stored(tmp_path)
    files[missing].unlink()
    assert not belongs(*files, IDENTITY)


def test_other_versions_do_not_belong(tmp_path: Path) -> None:
    """A package of last night's torch is built again."""
    assert not belongs(*stored(tmp_path), IDENTITY | {"versions": {"torch": "2.14.0"}})


@pytest.mark.parametrize(
    "other",
    [
        lambda: describe("n", make_net(), ((torch.ones(3, 4),), {}), {}, LEVEL),
        lambda: describe("n", make_net(), ((torch.ones(4, 2).T,), {}), {}, LEVEL),
        lambda: describe("n", make_net(), ((torch.ones(2, 4).bfloat16(),), {}), {}, LEVEL),
        lambda: describe("n", make_net(), ((), {"x": torch.ones(2, 4)}), {}, LEVEL),
        lambda: describe("n", make_net().bfloat16(), EXAMPLE, {}, LEVEL),
        lambda: describe("n", make_net(), EXAMPLE, {"max_autotune": True}, LEVEL),
        lambda: describe("n", make_net(), EXAMPLE, {}, get_level("compile")),
        lambda: describe("m", make_net(), EXAMPLE, {}, LEVEL),
    ],
    ids=["shape", "stride", "dtype", "keyword", "weights", "options", "level", "region"],
)
def test_identity_tells_packages_apart(other: Callable[[], dict[str, Any]]) -> None:
    """What a package depends on is in its name; the weights' values are not, they come from the pipeline."""
    mine = describe("n", make_net(), EXAMPLE, {}, LEVEL)
    assert other() != mine and mine == describe("n", make_net(seed=1), EXAMPLE, {}, LEVEL)
    assert json.loads(json.dumps(mine)) == mine


def test_capture_records_the_first_arguments_and_leaves_no_trace() -> None:
    """The spy is gone afterwards, and later calls do not change what was seen."""
    net = make_net()
    examples = capture_examples({"net": net}, lambda: (net(torch.zeros(1, 4)), net(x=torch.zeros(2, 4))))
    (args, kwargs) = examples["net"]
    assert args[0].shape == (1, 4) and kwargs == {} and "forward" not in vars(net)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A real package of `Net`, compiled once for this file."""
    with torch.no_grad():
        return make_package("net", make_net(), EXAMPLE, {}, LEVEL, tmp_path_factory.mktemp("aoti") / "private")


def remake(made: Package, net: nn.Module) -> Package:
    with torch.no_grad():
        return make_package("net", net, EXAMPLE, {}, LEVEL, made.path.parent)


def test_package_runs_on_each_modules_own_weights(made: Package) -> None:
    """One compiled region serves every instance of its class, and counts their calls."""
    x, calls = torch.linspace(-1, 1, 8).reshape(2, 4), made.calls
    for net in (make_net(1), make_net(2)):
        wanted = net(x)
        made.attach(net)
        torch.testing.assert_close(net(x), wanted)
    assert made.calls == calls + 2


def test_package_is_reused_for_other_weights(made: Package) -> None:
    """Found again by everything but the weights' values."""
    again = remake(made, make_net(seed=3))
    assert not made.reused and again.reused and again.path == made.path


def test_package_is_made_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one on another GPU waits and finds it whole."""

    def compile_slowly(exported: object, *, package_path: str, inductor_configs: dict[str, Any]) -> None:
        with Path(package_path).open("ab") as file:
            for part in (b"native ", b"code"):
                file.write(part)
                file.flush()
                time.sleep(0.5)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_slowly)
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: make_package("net", make_net(), EXAMPLE, {}, LEVEL, tmp_path / "new"), range(2)))
    assert sorted(package.reused for package in made) == [False, True]
    assert made[0].path.read_bytes() == b"native code"


def test_attaching_to_a_module_without_the_weights_is_refused(made: Package) -> None:
    """The error names the weights that are missing."""
    with pytest.raises(PackageError, match=r"ReLU differ in weights \['linear.bias', 'linear.weight', 'shift'\]"):
        made.attach(nn.ReLU())


def test_package_keeps_no_weight_in_its_code(made: Package) -> None:
    """A small or uniform weight folded into the code would be one block's value in every block."""
    runner = torch._inductor.aoti_load_package(str(made.path), run_single_threaded=True)
    assert set(runner.get_constant_fqns()) == set(make_net().state_dict())


def test_tampered_package_is_built_again(made: Package) -> None:
    """A package with one foreign byte is never loaded: it is replaced by one that belongs."""
    content = bytearray(made.path.read_bytes())
    content[len(content) // 2] ^= 1
    made.path.write_bytes(content)
    rebuilt = remake(made, make_net())
    assert not rebuilt.reused and remake(made, make_net()).reused


DEVICE_PARSER = """
#include <regex>
extern "C" int parse(const char* device) {
    try {
        std::smatch found;
        const std::string text(device);
        return std::regex_match(text, found, std::regex("(cpu|cuda)(:([0-9]+))?"));
    } catch (...) {
        return -1;
    }
}
"""
"""As AOTInductor's `parse_device_str`, which every package runs while it is loaded."""


def test_library_that_a_compiler_links_into_a_package(tmp_path: Path) -> None:
    """Where g++ links libstdc++ statically, every package crashed while it was loaded; torch's library mends that.

    With g++ 12 and torch 2.13 this returns -1 without `_share_cpp_library`: the expression cannot be compiled.
    """
    (tmp_path / "parser.cpp").write_text(DEVICE_PARSER)
    library = tmp_path / "parser.so"
    flags = ("-std=c++17", "-fPIC", "-shared", "-static-libstdc++")
    subprocess.run(["g++", *flags, str(tmp_path / "parser.cpp"), "-o", str(library)], check=True)
    script = f"""
import ctypes, torch
from fluxfast.aoti import _share_cpp_library
_share_cpp_library()
print(ctypes.CDLL({str(library)!r}).parse(b"cuda:0"))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "1\n"), ran.stderr


def test_package_is_loaded_beside_the_library_of_torch(made: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the load, in which the crash would be."""
    calls = []
    load = torch._inductor.aoti_load_package
    monkeypatch.setattr(aoti, "_share_cpp_library", lambda: calls.append("shared"))
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *a, **k: calls.append("loaded") or load(*a, **k))
    made.attach(make_net())
    assert calls == ["shared", "loaded"]


def test_load_does_not_try_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs half a minute on a large machine, and what it would tell of is in the manifest."""
    net = make_net()
    made = make_package("double", net, EXAMPLE, {}, LEVEL, tmp_path / "own")
    expected = net(*EXAMPLE[0])
    asked = torch._inductor.codecache.get_device_information
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.pick_vec_isa", lambda: pytest.fail("tried"))
    made.attach(net)
    torch.testing.assert_close(net(*EXAMPLE[0]), expected)
    assert torch._inductor.codecache.get_device_information is asked
