"""PyTorch's attention on the cases of the kernels' benchmark: what runs in the process that kernel_torch.py starts.

Reads a request a line and writes an answer a line, both JSON; imports no JAX. PyTorch gets its best: keys and values
repeated for the query heads before the clock starts, flex attention compiled for the very shape, and CUDA graphs where
calls are short.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

DEVICE = "cuda"
Run = Callable[[], Any]
# A mask of T x T for each head takes 2.1 GB for 64 heads here, and 16 times that for four times the tokens.
MAX_MASK_TOKENS = 4096
FILLER = "torch filler"


class Contestant(NamedTuple):
    """`make` compiles and returns what is timed, which returns the output. checked: it is the case's own function."""

    make: Callable[[], Run]
    checked: bool


class Case:
    """The inputs of one case in PyTorch's order, [B, heads, tokens, H], and who runs on them."""

    def __init__(self, kind: str, shape: dict[str, Any], num_caches: int, filler_bytes: int):
        import torch

        self.kind = kind
        self.B, self.S, self.N, self.K, self.H = (shape[letter] for letter in "BSNKH")
        self.T = 1 if kind == "decode" else shape["T"]
        self.scale = 1 / math.sqrt(self.H)
        self.dtype = getattr(torch, shape["dtype"])
        self.slopes: Any = None
        if shape["alibi"]:
            self.slopes = 2.0 ** (-8.0 / self.N * torch.arange(1, self.N + 1, device=DEVICE, dtype=torch.float32))
        differentiated = kind == "forward + backward"
        self.q = self.random(self.N, self.T).requires_grad_(differentiated)
        self.caches = [
            tuple(self.random(self.K, self.S).requires_grad_(differentiated) for _ in range(2))
            for _ in range(num_caches)
        ]
        self.cotangent = self.random(self.N, self.T) if differentiated else None
        self.filler = torch.rand(filler_bytes // 4, device=DEVICE) if filler_bytes else None

    def random(self, heads: int, tokens: int) -> Any:
        import torch

        return torch.randn(self.B, heads, tokens, self.H, device=DEVICE, dtype=self.dtype)

    def contestants(self) -> dict[str, Contestant]:
        plain, alibi = self.slopes is None, self.slopes is not None
        if self.kind == "decode":
            flex = "torch flex, ALiBi" if alibi else "torch flex"
            found = {
                "torch SDPA": Contestant(lambda: self.loop(self.grouped), checked=plain),
                flex: Contestant(lambda: self.loop(self.flex_decode()), checked=True),
            }
            if self.filler is not None:
                found[FILLER] = Contestant(lambda: self.loop(None), checked=False)
            return found
        found = {
            "torch SDPA, flash": Contestant(self.flash, checked=plain),
            "torch flex": Contestant(lambda: self.flex(alibi=False), checked=plain),
        }
        if alibi:
            found["torch flex, ALiBi"] = Contestant(lambda: self.flex(alibi=True), checked=True)
            if self.T <= MAX_MASK_TOKENS:
                found["torch SDPA, ALiBi as a mask of T x T"] = Contestant(self.masked, checked=True)
        return found

    def repeated(self, x: Any) -> Any:
        """Keys or values for each query head, as a leaf of their own."""
        return x.detach().repeat_interleave(self.N // self.K, 1).requires_grad_(x.requires_grad)

    def flash(self) -> Run:
        from torch.nn import functional
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = self.q, *(self.repeated(x) for x in self.caches[0])

        def run() -> Any:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        return self.with_gradients(run, q, k, v)

    def masked(self) -> Run:
        import torch
        from torch.nn import functional

        q, k, v = self.q, *(self.repeated(x) for x in self.caches[0])
        mask = torch.empty(1, self.N, self.T, self.S, device=DEVICE, dtype=self.dtype)
        j = torch.arange(self.S, device=DEVICE, dtype=torch.float32)
        hidden = torch.ones(self.T, self.S, device=DEVICE, dtype=torch.bool).triu(1)
        for head in range(self.N):  # one after the other, as in float32 they would take twice the memory
            bias = (j[None] - j[: self.T, None]) * (self.slopes[head] * self.scale)
            mask[0, head] = bias.masked_fill(hidden, -torch.inf)
        run = lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # noqa: E731
        return self.with_gradients(run, q, k, v)

    def flex(self, alibi: bool) -> Run:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        slopes, scale = self.slopes, self.scale
        q, (k, v) = self.q, self.caches[0]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, self.T, self.S, device=DEVICE)
        bias = (lambda s, b, h, i, j: s + slopes[h] * ((j - i) * scale)) if alibi else None
        attend = torch.compile(flex_attention, dynamic=False)
        run = lambda: attend(q, k, v, score_mod=bias, block_mask=mask, enable_gqa=True)  # noqa: E731
        return self.with_gradients(run, q, k, v)

    def with_gradients(self, forward: Run, *leaves: Any) -> Run:
        """`forward`, and the gradients of `leaves` where the case wants them."""
        import torch

        if self.cotangent is None:
            return forward

        def both() -> Any:
            out = forward()
            torch.autograd.grad(out, leaves, self.cotangent)
            return out

        return both

    def grouped(self, q: Any, k: Any, v: Any) -> Any:
        """One token: the heads that share keys and values take the place of tokens, and nothing is hidden."""
        from torch.nn import functional

        together = q.reshape(self.B, self.K, self.N // self.K, self.H)
        return functional.scaled_dot_product_attention(together, k, v).reshape(q.shape)

    def flex_decode(self) -> Callable[..., Any]:
        import torch
        from torch.nn.attention.flex_attention import flex_attention

        slopes, scale, last = self.slopes, self.scale, self.S - 1
        bias = None if slopes is None else lambda s, b, h, i, j: s + slopes[h] * ((j - last) * scale)
        attend = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: attend(q, k, v, score_mod=bias, enable_gqa=True)

    def loop(self, attend: Callable[..., Any] | None) -> Run:
        """One round of dependent calls over the caches, as a CUDA graph; what it returns is the first call's output."""
        import torch

        def one_round() -> list[Any]:
            made = [self.q]
            if self.filler is not None:
                made = [self.q + (self.filler.max() > 1).to(self.q.dtype)]
            if attend is not None:
                for k, v in self.caches:
                    made.append(attend(made[-1], k, v))
            return made

        with torch.no_grad():
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for _ in range(2):
                    one_round()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                made = one_round()

        def replay() -> Any:
            graph.replay()
            return made[min(1, len(made) - 1)]

        return replay

    def error(self, out: Any) -> float:
        """The largest error of the last 64 queries over what is allowed, against the formula in float32."""
        import torch

        with torch.no_grad():
            rows = min(64, self.T)
            k, v = (self.repeated(x.detach()) for x in self.caches[0])
            q = self.q.detach()[:, :, -rows:]
            i = torch.arange(self.S - rows, self.S, device=DEVICE)[:, None]
            j = torch.arange(self.S, device=DEVICE)[None]

            def formula(dtype: Any) -> Any:
                scores = (q.to(dtype) @ k.to(dtype).transpose(2, 3)).float() * self.scale
                if self.slopes is not None:
                    scores += self.slopes[:, None, None] * ((j - i) * self.scale)
                weights = scores.masked_fill(j > i, -1e30).softmax(-1).to(dtype)
                return (weights @ v.to(dtype)).float()

            exact = formula(torch.float32)
            allowed = 2 * (formula(self.dtype) - exact).abs().max() + 1e-5
            return float((out.detach()[:, :, -rows:].float() - exact).abs().max() / allowed)


def prepare(request: dict[str, Any], runs: dict[str, Run]) -> dict[str, Any]:
    """Fills `runs` with those that can run; the answer says of each its error, or the reason why it cannot."""
    import torch

    runs.clear()
    if not torch.cuda.is_available():
        return {"reason": "torch sees no GPU"}
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    case = Case(**request)
    answers = []
    for name, contestant in case.contestants().items():
        answer: dict[str, Any] = {"name": name}
        try:
            run = contestant.make()
            out = run()
            if not bool(torch.isfinite(out).all()):
                raise ArithmeticError("it gives numbers that are not finite")
            if contestant.checked:
                answer["error"] = case.error(out)
            runs[name] = run
        except Exception as error:
            answer["reason"] = describe(error)
        answers.append(answer)
    return {"contestants": answers}


def seconds(run: Run, num_calls: int) -> float:
    """Of one call, by the GPU's own clock."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(num_calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / num_calls


def describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def main() -> None:
    # Compilers write to stdout what they please: answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runs: dict[str, Run] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "time" in request:
                answer = {"seconds": seconds(runs[request["time"]], request["num_calls"])}
            else:
                answer = prepare(request, runs)
        except Exception as error:
            answer = {"reason": describe(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
