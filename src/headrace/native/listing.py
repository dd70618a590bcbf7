"""A program as lines that a person can read: what each instruction makes of what, and the bytes it reads."""

from __future__ import annotations

from collections.abc import Iterator

from headrace.native.program import READ, WRITTEN, Instruction, Program

__all__ = ["program_lines"]


def program_lines(program: Program) -> Iterator[str]:
    """The listing, a line at a time: cache and registers, then `number op results ← operands · weights bytes`.

    A linear names what its input is in a prompt: int8 with a scale for so many columns, or fine as in decoding."""
    c = program.config
    kind, width = ("int8", 1) if program.kv_scales else ("float32", 4)
    sizes = [program.bytes_read(instruction) for instruction in program.instructions]
    yield f"layers     {c.num_layers}"
    yield f"weights    {sum(sizes):,} bytes a token"
    yield f"cache      {kind}, {2 * c.num_layers * c.kv_size * width:,} bytes a position, {program.context} positions"
    yield f"registers  {', '.join(f'r{i} {width}' for i, width in enumerate(program.registers))}"
    yield ""
    for number, (instruction, size) in enumerate(zip(program.instructions, sizes)):
        yield f"{number:5}  {_line(instruction)}{f'  {size:,} bytes' if size else ''}"


def _line(instruction: Instruction) -> str:
    made = " ".join(f"r{r}" for r in instruction.operands(WRITTEN))
    used = " ".join(f"r{r}" for r in instruction.operands(READ)) or "ids"
    goal = made or {"rope_cache": "cache", "head": "logits"}[instruction.op]
    where = [f"layer {instruction.fields['layer']}"] if "layer" in instruction.fields else []
    if "group" in instruction.fields:
        group = instruction.fields["group"]
        where = [f"int8 by {group}" if group else "fine"]
    names = [name.removesuffix(".weight") for name in instruction.weights]
    return f"{instruction.op:<10}  {goal} ← {' · '.join([used, *where, *names])}"
