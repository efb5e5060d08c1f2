"""cuBLASLt without a workspace, and the count that shows it.

Its heuristic for float8 on Hopper prefers kernels with a dynamic schedule, which clear a counter of tiles in the
workspace before every GEMM: a memset node and a gap in a CUDA graph. Without a workspace it takes the same kernels with
a static schedule.
"""

from __future__ import annotations

import ctypes
import os

import torch

MEMSET_NODE = 2
"""`CU_GRAPH_NODE_TYPE_MEMSET` of the CUDA driver API."""


def drop() -> None:
    """Give cuBLASLt no workspace, for this process and from now on.

    Where torch has no setter, it reads the size from the environment when cuBLASLt is first used, and never again.
    """
    os.environ["CUBLASLT_WORKSPACE_SIZE"] = "0"
    if hasattr(torch._C, "_cuda_setCublasLtWorkspaceSize"):
        torch.backends.cuda.cublaslt_workspace_size(0)


def memsets_of_a_gemm(rows: int = 4096, width: int = 3072) -> int:
    """Memset nodes in a CUDA graph of one row-wise float8 GEMM, (rows, width) x (width, width)."""
    a, b = (torch.ones(n, width, device="cuda", dtype=torch.float8_e4m3fn) for n in (rows, width))
    scales = torch.ones(rows, 1, device="cuda"), torch.ones(1, width, device="cuda")

    def multiply() -> None:
        torch._scaled_mm(a, b.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)

    multiply()  # handles and modules are made outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        multiply()
    return node_types(graph).count(MEMSET_NODE)


def node_types(graph: torch.cuda.CUDAGraph) -> list[int]:
    """`CUgraphNodeType` of every node.

    Args:
        graph: captured with `keep_graph=True`.

    Raises:
        RuntimeError: with the driver's status.
    """
    driver, handle = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(graph.raw_cuda_graph())
    count = ctypes.c_size_t()
    _check(driver.cuGraphGetNodes(handle, None, ctypes.byref(count)))
    nodes = (ctypes.c_void_p * count.value)()
    _check(driver.cuGraphGetNodes(handle, nodes, ctypes.byref(count)))
    types = []
    for node in nodes:
        kind = ctypes.c_int()
        _check(driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)))
        types.append(kind.value)
    return types


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"the CUDA driver cannot list the nodes of a graph: status {status}")
