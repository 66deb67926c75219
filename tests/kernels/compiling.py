"""Compiles every Triton kernel for a card that need not be there: `python tests/kernels/compiling.py 80 [float32]`.

The interpreter takes what a compiler refuses: types that change in a branch, names bound twice, shapes that do not fit.
So each launch is turned into a compilation of the kernel for the arguments it was given, down to machine code. Nothing
runs; what the kernels would have written is garbage.
"""

import sys
import warnings
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
DONE: dict[tuple[str, str], None] = {}
SHARED = {torch.bfloat16: 101_376, torch.float32: 166_912}
"""Bytes of shared memory that a kernel may take at heads of 256: those of small cards, and of an A100."""


def type_of(value: Any) -> str:
    """How a launch would declare an argument."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def is_one(value: Any) -> bool:
    """A launch declares the number 1 a constant."""
    return isinstance(value, int) and value == 1


def compile_launch(target: GPUTarget, dtype: torch.dtype) -> Any:
    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        del grid, warmup
        names = [parameter.name for parameter in self.params]
        values = dict(zip(names, args, strict=False)) | {name: named[name] for name in named if name in names}
        fixed = {p.name for p in self.params if p.is_constexpr or is_one(values[p.name])}
        signature = {name: "constexpr" if name in fixed else type_of(values[name]) for name in names}
        constants = {(at,): values[name] for at, name in enumerate(names) if name in fixed}
        if (key := (self.__name__, f"{signature} {constants}")) in DONE:
            return
        options = {name: named[name] for name in named if name not in names}
        aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if "*" in signature[name]}
        compiled = triton.compile(ASTSource(self, signature, constants, aligned), target=target, options=options)
        assert compiled.metadata.shared <= SHARED[dtype], (self.__name__, compiled.metadata.shared)
        DONE[key] = None

    return run


def launch_shared(dtype: torch.dtype) -> None:
    from dspark.kernels import noise_triton
    from dspark.kernels.attention import Span
    from dspark.kernels.triton_kernels import TRITON

    cpu = torch.device("cpu")
    x, w = torch.zeros(2, 64, dtype=dtype), torch.zeros(64)
    TRITON.rms_norm(x, w, 1e-6)
    TRITON.add_norm(x, x, w, 1e-6)
    TRITON.add_norm(x, x, w, 1e-6, w)
    matrix = torch.zeros(96, 64, dtype=dtype)
    TRITON.linear(matrix)(x)
    TRITON.gated(matrix, matrix, "silu")(x)
    TRITON.gated(matrix, matrix, "gelu_tanh")(x)
    turn = torch.zeros(2, 1, 32)
    TRITON.rotary(x[:, None], turn, turn)
    noise_triton.keyed_bits(*[torch.zeros(3, dtype=torch.int64)] * 4)
    for window in (None, 20):
        spans = [Span(0, 600, 2, list(range(1, 40)))]
        plan = TRITON.plan_attention(spans, page_size=16, window=window, group=2, dtype=dtype, device=cpu)
        storage = torch.zeros(4, 40, 16 * 64, dtype=dtype)
        qkv = torch.zeros(2, 8, 64, dtype=dtype)
        q = TRITON.norm_rotary_write(qkv, torch.zeros(6, 64), 1e-6, turn, turn, storage, plan)
        TRITON.paged_attention(q, storage, plan, 0.125)


def launch_attention(dtype: torch.dtype) -> None:
    """Heads of 256, four to a group, as Gemma 3 has them."""
    from dspark.kernels.attention import Span
    from dspark.kernels.triton_kernels import TRITON
    from services.draft.context import ContiguousKV, KVShape
    from services.draft.kernels import attention_triton
    from services.draft.kernels.attention import Span as BlockSpan

    cpu = torch.device("cpu")
    plan = TRITON.plan_attention(
        [Span(0, 600, 2, list(range(1, 40)))], page_size=16, window=None, group=4, dtype=dtype, device=cpu
    )
    TRITON.paged_attention(torch.zeros(2, 4, 256, dtype=dtype), torch.zeros(2, 40, 16 * 256, dtype=dtype), plan, 0.1)
    context = ContiguousKV(KVShape(1, 1, 256, 8), 1024, dtype=dtype, device=cpu)
    context.require(600)
    context.length = 600
    query, keys, values = (torch.zeros(3, heads, 256, dtype=dtype) for heads in (4, 1, 1))
    block = attention_triton.plan_block([BlockSpan(context, 3)], causal=False, group=4)
    attention_triton.block_attention(query, keys, values, block, 0)


def launch_verifier(dtype: torch.dtype) -> None:
    from dspark.messages import Mode, Sampling
    from services.verifier.candidates import Candidate
    from services.verifier.kernels import features_triton, verify_triton

    request = Candidate(Sampling(mode=Mode.REJECTION), 0, 5, (1, 2))
    verify_triton.verify(torch.zeros(3, 300, dtype=dtype), [request], noise_candidates=32)
    state = torch.zeros(4, 64, dtype=dtype)
    for eps in (None, 1e-6):
        projected = features_triton.tap_inputs([state, state], eps)
        features_triton.tap_outputs(projected, projected[0] if eps else None, projected[0], 1e-6)


def launch_draft(dtype: torch.dtype) -> None:
    from dspark.messages import Mode, Sampling
    from dspark.models.drafters.heads import ConfidenceHead, GatedMarkovHead, MarkovHead
    from dspark.sampling import DraftChooser
    from services.draft.context import ContiguousKV, KVShape
    from services.draft.kernels import attention_triton, sequential_triton
    from services.draft.kernels.attention import Span
    from services.draft.kernels.sequential import ConfidenceRow, SequentialHead

    context = ContiguousKV(KVShape(1, 2, 64, 8), 1024, dtype=dtype, device=torch.device("cpu"))
    context.require(600)
    context.length = 600
    query, keys, values = (torch.zeros(3, n, 64, dtype=dtype) for n in (4, 2, 2))
    for causal in (False, True):
        plan = attention_triton.plan_block([Span(context, 3)], causal=causal, group=2)
        attention_triton.block_attention(query, keys, values, plan, 0)
    for kind, d2t in ((MarkovHead, None), (GatedMarkovHead, torch.zeros(300, dtype=torch.int64))):
        head = kind(400, 300, 24, 64).to(dtype).requires_grad_(requires_grad=False)
        head.rows = None if d2t is None else torch.zeros(400, dtype=torch.int64)
        confidence = ConfidenceRow.of(ConfidenceHead(64, 24).requires_grad_(requires_grad=False), 64)
        own = SequentialHead(head, torch.nn.Identity(), confidence, d2t, DraftChooser(draft_top_k=32))
        base, hidden = torch.zeros(2, 1, 300), torch.zeros(2, 1, 64, dtype=dtype)
        samplings = [Sampling(), Sampling(mode=Mode.REJECTION)]
        sequential_triton.draft_tokens(own, base, hidden, [1, 2], [5, 6], samplings)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    of = getattr(torch, sys.argv[2] if len(sys.argv) > 2 else "bfloat16")
    JITFunction.run = compile_launch(GPUTarget("cuda", int(sys.argv[1]), 32), of)
    for launch in (launch_shared, launch_attention, launch_verifier, launch_draft):
        launch(of)
    print(*sorted({name for name, _ in DONE}), len(DONE))
