"""torch.export + AOTInductor packages of both block classes and the VAE decoder, built here or reused after a check.

A `.pt2` is native code and its own metadata holds no versions, so every package has a manifest beside it, written last.
A package is loaded only if its hash and every line of the manifest are right; anything else means: build it again. The
hash is integrity, not authenticity, which is why packages live in a private folder and are never downloaded.

Constants stay outside: a package is a few MB, and the weights it runs on are the pipeline's own tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import stat
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._functorch._aot_autograd.subclass_parametrization import unwrap_tensor_subclass_parameters
from torch.utils import _pytree as pytree

from fluxfast.errors import PackageError
from fluxfast.levels import Level
from fluxfast.machine import cpu_capability

PACKAGES = ("torch", "triton", "torchao", "diffusers", "fa3-fwd", "flash-attn-3")
"""Distributions whose version a compiled package depends on."""

WEIGHTS_OUTSIDE = {
    "aot_inductor.package_constants_in_so": False,
    # Inductor writes tensors of up to eight elements into the code, and folds uniform ones, float8 scales among them:
    # one block's package would run every block with the scales of the block that was exported.
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,
}

Example = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass
class Package:
    """A compiled region and how often it ran.

    Attributes:
        name: "double", "single" or "decoder".
        options: what Inductor was given, as the manifest says.
        reused: whether it was found compiled.
        calls: calls of any of its instances.
    """

    name: str
    path: Path
    options: dict[str, Any]
    reused: bool
    calls: int = 0

    def attach(self, module: nn.Module) -> None:
        """Run `module.forward` through this package, on the module's own weights.

        Raises:
            PackageError: if the package's weights are not exactly the module's.
        """
        unwrap_tensor_subclass_parameters(module)
        _share_cpp_library()
        with _known_device():
            runner = torch._inductor.aoti_load_package(str(self.path), run_single_threaded=True)
        weights = dict(module.named_parameters()) | dict(module.named_buffers())
        names = runner.get_constant_fqns()
        if odd := sorted(set(names) ^ set(weights)):
            raise PackageError(
                f"package {self.path} and {type(module).__name__} differ in weights {odd}: one that the package lacks "
                "is baked into its code with the value of another block"
            )
        runner.load_constants({name: weights[name] for name in names}, check_full_update=True, user_managed=True)

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return runner(*args, **kwargs)

        module.forward = forward


@contextlib.contextmanager
def _known_device() -> Iterator[None]:
    """Spare a load PyTorch's comparison of devices: it warns of what the manifest refuses, and is slow.

    The first time in a process it tries each kind of vector instructions that the processor names, with a compiler and
    a Python that loads what it made: 6 s for AVX2 alone, and probably most of the 35 s that a process's first package
    took on the host of four H100s.
    """
    from torch._inductor import codecache  # takes seconds, and levels without packages do without

    asked = codecache.get_device_information
    codecache.get_device_information = lambda device_type: {}
    try:
        yield
    finally:
        codecache.get_device_information = asked


def _share_cpp_library() -> None:
    """Let packages use the C++ library that torch runs on, whatever their compiler put into them.

    A compiler that links libstdc++ statically gives each package a copy, and the loader mixes the two: `std::regex`, by
    which a package reads the name of its device, then finds another class where its locale should be and crashes.
    """
    ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)


def capture_examples(modules: dict[str, nn.Module], call: Callable[[], object]) -> dict[str, Example]:
    """The arguments that each module's `forward` gets during one `call`."""
    examples: dict[str, Example] = {}

    def spy(name: str, module: nn.Module) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            examples.setdefault(name, (args, kwargs))
            return original(*args, **kwargs)

        module.forward = forward

    for name, module in modules.items():
        spy(name, module)
    call()
    for module in modules.values():
        del module.forward
    return examples


def make_package(name: str, module: nn.Module, example: Example, options: dict[str, Any], level: Level,
                 folder: Path) -> Package:  # fmt: skip
    """Find or compile the package of `module`.

    Args:
        name: of the region.
        module: one instance of the block class, float8 weights included.
        example: arguments it is exported with; shapes are static.
        options: for Inductor.
        level: part of the package's identity.
        folder: private folder of packages and manifests.

    Raises:
        PackageError: if the folder is not private to this user.
    """
    private_folder(folder)
    unwrap_tensor_subclass_parameters(module)
    identity = describe(name, module, example, options, level)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path, manifest = folder / f"{name}-{key}.pt2", folder / f"{name}-{key}.manifest.json"
    with _locked(folder):
        reused = belongs(path, manifest, identity)
        if not reused:
            manifest.unlink(missing_ok=True)
            exported = torch.export.export(module, *example, strict=False)
            configs = options | WEIGHTS_OUTSIDE
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=configs)
            _write_atomically(manifest, identity | {"sha256": _sha256(path), "size": path.stat().st_size})
    return Package(name, path, options, reused)


def private_folder(folder: Path) -> None:
    """Create `folder` with mode 0700, or check that it is ours alone.

    Raises:
        PackageError: if others own it or can write to it, or it is a link.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.lstat()
    if stat.S_ISLNK(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise PackageError(
            f"package folder {folder} is a link, another user's or writable by others, and packages are native code: "
            f"run `chmod 700 {folder}` or name another cache folder"
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold `folder` against processes on other GPUs: Inductor writes a package in place, where they would load half."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough if Inductor forked meanwhile
        os.close(descriptor)


def belongs(path: Path, manifest: Path, identity: dict[str, Any]) -> bool:
    """Whether the package at `path` is exactly the one that `identity` describes."""
    try:
        stored = json.loads(manifest.read_text(encoding="utf-8"))
        size = path.stat().st_size
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(stored, dict):
        return False
    expected = identity | {"sha256": stored.get("sha256"), "size": size}
    return stored == expected and stored["sha256"] == _sha256(path)


def describe(name: str, module: nn.Module, example: Example, options: dict[str, Any], level: Level) -> dict[str, Any]:
    """Everything that a compiled package depends on, as JSON values."""
    leaves, spec = pytree.tree_flatten(example)
    cuda = torch.cuda.is_available()
    return {
        "region": name,
        "module": type(module).__qualname__,
        "level": level.fields(),
        "options": options,
        "versions": {package: _version(package) for package in PACKAGES} | {"cuda": torch.version.cuda},
        "source": _source_digest(),
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "cpu_capability": cpu_capability(),
        "arguments": [_shape(leaf) for leaf in leaves],
        "structure": str(spec),
        "constants": {n: _shape(t) for n, t in (*module.named_parameters(), *module.named_buffers())},
    }


def _shape(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return [list(leaf.shape), list(leaf.stride()), str(leaf.dtype), leaf.device.type]
    return repr(leaf)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _source_digest() -> str:
    """Of this package's own code: a changed processor or step is another package."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomically(path: Path, value: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
