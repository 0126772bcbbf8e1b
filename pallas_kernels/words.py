"""Numbers that one block writes and another waits for, without a counter or a fence between them.

Each float32 lies in a word of 64 bits beside the number of the launch that it belongs to. The GPU writes and reads such
words whole, so whoever finds the launch's number there has its number too. All here emit code.
"""

from collections.abc import Sequence

from jaxlib.mlir import ir

from pallas_kernels.instructions import do, make

WORD_BYTES = 8


def put(address: ir.Value, numbers: Sequence[ir.Value], launch: ir.Value, *, scope: str) -> None:
    """Writes an even count of float32 side by side from an address on, which is a multiple of 16.

    scope: who reads them: "gpu", or "sys" where that may be another GPU.
    """
    operands = [address, *numbers, launch]
    number = f"${len(operands) - 1}"
    lines = [".reg .b64 first, second;"]
    for i in range(0, len(numbers), 2):
        lines += [f"mov.b64 first, {{${i + 1}, {number}}};", f"mov.b64 second, {{${i + 2}, {number}}};"]
        lines.append(f"st.relaxed.{scope}.global.v2.b64 [$0 + {WORD_BYTES * i}], {{first, second}};")
    do("{\n" + "\n".join(lines) + "\n}", *operands)


def take(
    places: Sequence[tuple[ir.Value, int]], lefts: Sequence[ir.Value | None], launch: ir.Value, *, scope: str
) -> Sequence[ir.Value]:
    """Reads two words at each place, address and offset, again and again until they hold the launch's number.

    lefts: None, or what is above 0 where the place exists. The others' numbers are zero.
    scope: as of `put`.
    """
    n = len(places)
    inputs = [launch, *(address for address, _ in places), *(left for left in lefts if left is not None)]
    operand = {value: f"${2 * n + i}" for i, value in enumerate(inputs)}
    number = operand[launch]
    lines = [".reg .pred p;", ".reg .b32 one, other, differs;", f".reg .b32 missing<{n}>;", f".reg .b64 word<{2 * n}>;"]
    for i, left in enumerate(lefts):
        lines.append(f"mov.b32 missing{i}, 1;")
        if left is not None:
            lines += [f"setp.gt.s32 p, {operand[left]}, 0;", f"selp.b32 missing{i}, 1, 0, p;"]
            lines += [f"mov.b64 word{2 * i + which}, {{0, {number}}};" for which in range(2)]
    lines.append("again:")  # those that are there already are not asked for again
    for i, (address, offset) in enumerate(places):
        words = f"{{word{2 * i}, word{2 * i + 1}}}"
        lines.append(f"setp.ne.s32 p, missing{i}, 0;")
        lines.append(f"@p ld.relaxed.{scope}.global.v2.b64 {words}, [{operand[address]} + {offset}];")
    lines.append("mov.b32 differs, 0;")
    for i in range(n):
        lines.append(f"mov.b64 {{${2 * i}, one}}, word{2 * i};")
        lines.append(f"mov.b64 {{${2 * i + 1}, other}}, word{2 * i + 1};")
        lines += [f"xor.b32 one, one, {number};", f"xor.b32 other, other, {number};"]
        lines += [f"or.b32 missing{i}, one, other;", f"or.b32 differs, differs, missing{i};"]
    lines += ["setp.ne.s32 p, differs, 0;", "@p bra again;"]
    return make("{\n" + "\n".join(lines) + "\n}", *inputs, num_results=2 * n)
