# SPDX-License-Identifier: Apache-2.0
"""What one lane of a warp executes of a kernel's machine code (``sass.py``), for given parameters.

It knows integers alone: what is loaded or a float is unknown to it, except that what is polled is there at once. So its
branches are the real ones where they depend on sizes and indices, as a persistent kernel's do.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sass import Code, Instruction, is_publication, is_sent

NO_RESULT = ("BAR", "BREAK", "BSSY", "BSYNC", "CCTL", "MEMBAR", "ST", "STG", "STL", "STS", "WARPSYNC")
MASK = 0xFFFFFFFF
Value = int | None  # None: not known


def signed(value: int) -> int:
    return value - (1 << 32) if value & 0x80000000 else value


class Lane:
    """One lane of a warp: the integers that it knows, and what it executes until the kernel ends.

    ``awaited``: addresses in shared memory that another block writes; what is read there is there at once, too.
    """

    def __init__(
        self,
        code: Code,
        constants: Mapping[int, int],
        thread: int,
        block: int,
        shared: int,
        awaited: Set[int] = frozenset(),
    ) -> None:
        self.code, self.constants, self.shared, self.awaited = code, constants, shared, awaited
        self.special = {"SR_TID.X": thread, "SR_CTAID.X": block}
        self.registers: dict[str, Value] = {}
        self.predicates: dict[str, bool | None] = {}
        self.unknown: list[str] = []  # branches whose predicate was not known
        self.clears: set[int] = set()  # addresses of stores that empty what was published before
        self.sent: set[int] = set()  # where in another block's shared memory it stores
        self.takes: set[int] = set()  # addresses of loads of what another block stores

    # -- operands

    def get(self, word: str) -> Value:
        if word.startswith("-"):
            value = self.get(word[1:])
            return None if value is None else -value & MASK
        if word.startswith("~"):
            value = self.get(word[1:])
            return None if value is None else ~value & MASK
        if word.startswith("|"):
            value = self.get(word[1:-1])
            return None if value is None else abs(signed(value))
        if word in ("RZ", "URZ", "SRZ"):
            return 0
        if re.fullmatch(r"0x[0-9a-f]+", word):
            return int(word, 16) & MASK
        if found := re.fullmatch(r"c\[0x0\]\[(?:(U?R\w+)\+)?(?:0x([0-9a-f]+))?\]", word):
            base = self.get(found[1]) if found[1] else 0
            return None if base is None else self.constants.get(base + int(found[2] or "0", 16))
        return self.registers.get(word, 0)

    def upper(self, word: str) -> str:
        """The register after this one, or the word four bytes on."""
        if word in ("RZ", "URZ", "SRZ") or word.startswith("0x"):
            return "RZ"
        if found := re.fullmatch(r"c\[0x0\]\[(.*?)(?:0x([0-9a-f]+))?\]", word):
            return f"c[0x0][{found[1]}0x{int(found[2] or '0', 16) + 4:x}]"
        sign, name = re.fullmatch(r"(-?)(.*)", word).groups()
        letters, number = re.fullmatch(r"(U?R)(\d+)", name).groups()
        return f"{sign}{letters}{int(number) + 1}"

    def wide(self, word: str) -> Value:
        low, high = self.get(word), self.get(self.upper(word))
        return None if low is None or high is None else low | high << 32

    def set(self, word: str, value: Value) -> None:
        if word not in ("RZ", "URZ"):
            self.registers[word] = None if value is None else value & MASK

    def set_wide(self, word: str, value: Value) -> None:
        self.set(word, value)
        self.set(self.upper(word), None if value is None else value >> 32)

    def place(self, operand: str) -> Value:
        """The 32-bit address of an operand like [R8+UR4+0x10]."""
        values = [self.get(word.removesuffix(".X4")) for word in operand.strip("[]").split("+")]
        return None if None in values else sum(values) & MASK

    def test(self, word: str) -> bool | None:
        if word.startswith("!"):
            value = self.test(word[1:])
            return None if value is None else not value
        return True if word in ("PT", "UPT") else self.predicates.get(word)

    def set_predicate(self, word: str, value: bool | None) -> None:
        if word not in ("PT", "UPT"):
            self.predicates[word] = value

    # -- instructions

    def run(self, limit: int = 200_000) -> list[Instruction]:
        trace: list[Instruction] = []
        at = 0
        while len(trace) < limit:
            one = self.code.instructions[at]
            at += 1
            guard = self.test(one.guard) if one.guard else True
            if one.name in ("BRA", "BRA.U", "BRA.CONV", "BRA.DIV", "BRA.UNI"):
                trace.append(one)
                taken = guard
                for word in one.operands[:-1]:
                    test = self.test(word) if word[-2:-1] == "P" or word.endswith("PT") else True
                    taken = False if taken is False or test is False else None if test is None else taken
                if one.name == "BRA.DIV":
                    taken = False
                if taken is None:
                    self.unknown.append(one.text)
                if taken:
                    at = self.code.labels[re.search(r"\.L_\w+", one.operands[-1])[0]]
                continue
            if guard is False:  # it takes its place all the same
                trace.append(replace(one, name="NOP", text=f"{one.text}, skipped"))
                continue
            trace.append(one)
            if one.base == "EXIT":
                return trace
            if one.base in ("BPT", "CALL"):
                raise RuntimeError(f"the kernel stops itself at {one.address:x}")
            self.execute(one, guard)
        raise RuntimeError(f"more than {limit} instructions")

    def execute(self, one: Instruction, guard: bool | None) -> None:
        if is_publication(one) and self.get(one.operands[-1]) == MASK:
            self.clears.add(one.address)
        if is_sent(one) and (to := self.place(one.operands[0])) is not None:
            self.sent.add(to & 0xFFFFFF)  # above it, which block's
        if one.base == "LDS" and self.place(one.operands[1]) in self.awaited:
            self.takes.add(one.address)
            self.set_wide(one.operands[0], 0)
            return
        method = getattr(self, f"do_{one.base.lower()}", None) or getattr(self, f"do_{one.base.lower()[1:]}", None)
        before = dict(self.registers), dict(self.predicates)
        if one.base in NO_RESULT:
            return
        if method is not None and one.operands:
            method(one.name.split(".")[1:], one.operands)
        elif one.operands:  # a result that is not known
            wide = 4 if ".128" in one.name or one.base in ("HMMA", "HGMMA") else 2 if ".64" in one.name else 1
            word = one.operands[0]
            if re.fullmatch(r"U?R\d+", word):
                for _ in range(wide):
                    self.set(word, None)
                    word = self.upper(word)
            for word in one.operands[:2]:
                if re.fullmatch(r"U?P\d", word):
                    self.set_predicate(word, None)
        if guard is None:  # perhaps not executed
            for now, then in zip((self.registers, self.predicates), before):
                for key, value in now.items():
                    if then.get(key) != value:
                        now[key] = None

    def split(self, operands: Sequence[str]) -> tuple[str, list[str], list[str]]:
        """(result, predicates written, sources)."""
        outs = 1
        while outs < len(operands) and re.fullmatch(r"U?P[\dT]", operands[outs]) and outs < 3:
            outs += 1
        return operands[0], list(operands[1:outs]), list(operands[outs:])

    def do_mov(self, kinds, o):
        self.set(o[0], self.get(o[1]))

    def do_cs2r(self, kinds, o):
        value = 0 if o[1] in ("SRZ", "SR_CLOCKHI") else None
        self.set(o[0], value) if "32" in kinds else self.set_wide(o[0], value)

    def do_s2r(self, kinds, o):
        self.set(o[0], self.special.get(o[1], 0))

    do_s2ur = do_s2r

    def do_r2ur(self, kinds, o):
        self.set(o[0], self.get(o[-1]))

    def do_ldc(self, kinds, o):
        self.set_wide(o[0], self.wide(o[1])) if "64" in kinds else self.set(o[0], self.get(o[1]))

    def do_uldc(self, kinds, o):
        value = self.get(o[1])
        if "U8" in kinds and value is None:
            address = int(re.search(r"\[0x([0-9a-f]+)\]$", o[1])[1], 16)
            word = self.constants.get(address & ~3)
            value = None if word is None else word >> 8 * (address & 3)
        if "U8" in kinds and value is not None:
            value &= 0xFF
        self.set_wide(o[0], self.wide(o[1])) if "64" in kinds else self.set(o[0], value)

    def do_ldg(self, kinds, o):
        """What is polled is there at once; all else is unknown."""
        word = o[0]
        for _ in range(4 if "128" in kinds else 2 if "64" in kinds else 1):
            self.set(word, 0 if "STRONG" in kinds else None)
            word = self.upper(word)

    def do_lds(self, kinds, o):
        word = o[0]
        for _ in range(4 if "128" in kinds else 2 if "64" in kinds else 1):
            self.set(word, None if "128" in kinds or "64" in kinds else self.shared)
            word = self.upper(word)

    def do_shfl(self, kinds, o):
        self.set_predicate(o[0], True)
        self.set(o[1], self.get(o[2]))

    def do_iadd3(self, kinds, o):
        result, outs, sources = self.split(o)
        if "64" in kinds:
            values = [self.wide(word) for word in sources[:3]]
            return self.set_wide(result, None if None in values else sum(values))
        values = [self.get(word) for word in sources[:3]]
        # A negated operand is its complement and 1: 0 too makes a carry.
        values = [1 << 32 if word in ("-RZ", "-URZ") or word[0] == "-" and value == 0 else value
                  for word, value in zip(sources, values)]  # fmt: skip
        if "X" in kinds:
            carries = [self.test(word) for word in sources[3:]]
            values += [None if carry is None else int(carry) for carry in carries]
        total = None if None in values else sum(values)
        for place, out in enumerate(outs):
            self.set_predicate(out, None if total is None else total >> 32 > place)
        self.set(result, total)

    def do_viadd(self, kinds, o):
        self.do_iadd3([], [o[0], *o[1:], "RZ"])

    def do_viaddmnmx(self, kinds, o):
        values = [self.get(word) for word in o[1:4]]
        if None in values:
            return self.set(o[0], None)
        both = [signed((values[0] + values[1]) & MASK), signed(values[2])]
        self.set(o[0], min(both) if self.test(o[4]) else max(both))

    def do_imnmx(self, kinds, o):
        values = [self.get(word) for word in o[1:-1]]
        if None in values:
            return self.set(o[0], None)
        if "U32" not in kinds:
            values = [signed(value) for value in values]
        self.set(o[0], min(values) if self.test(o[-1]) else max(values))

    do_vimnmx = do_vimnmx3 = do_imnmx

    def do_imad(self, kinds, o):
        result, outs, (a, b, c, *rest) = self.split(o)
        a, b = self.get(a), self.get(b)
        product = 0 if a == 0 or b == 0 else None
        if a is not None and b is not None:
            product = a * b if "U32" in kinds or "HI" not in kinds and "WIDE" not in kinds else signed(a) * signed(b)
        if "WIDE" in kinds:
            c = self.wide(c)
            return self.set_wide(result, None if product is None or c is None else product + c)
        if "HI" in kinds:
            c = self.wide(c)
            return self.set(result, None if product is None or c is None else (product + c) >> 32)
        c = self.get(c)
        carry = [self.test(word) for word in rest] if "X" in kinds else []
        unknown = product is None or c is None or None in carry
        self.set(result, None if unknown else product + c + sum(carry))

    def do_shf(self, kinds, o):
        low, by, high = (self.get(word) for word in o[1:4])
        wanted = "HI" in kinds
        if "L" in kinds and "HI" not in kinds:
            return self.set(o[0], None if low is None or by is None else low << min(by, 32))
        if by is None or (high is None) or (low is None):
            known = high if wanted and "R" in kinds and low == 0 else None
            return self.set(o[0], None if known is None or by is None else known >> by)
        if "L" in kinds:
            return self.set(o[0], ((high << 32 | low) << by) >> 32)
        if "S32" in kinds:
            high = signed(high)
        both = high * (1 << 32) + low
        self.set(o[0], both >> by >> 32 if wanted else both >> by)

    def do_lea(self, kinds, o):
        result, outs, sources = self.split(o)
        if "HI" in kinds:
            a, b = self.get(sources[0]), self.get(sources[1])
            sx32 = "SX32" in kinds
            high = (None if a is None else MASK if a >> 31 else 0) if sx32 else self.get(sources[2])
            by = self.get(sources[2 if sx32 else 3])
            carry = self.test(sources[-1]) if "X" in kinds else False
            unknown = None in (a, b, high, by, carry)
            return self.set(result, None if unknown else ((high << 32 | a) >> (32 - by)) + b + carry)
        a, b, by = self.get(sources[0]), self.get(sources[1]), self.get(sources[2])
        total = None if None in (a, b, by) else (a << by & MASK) + b
        for out in outs:
            self.set_predicate(out, None if total is None else total >> 32 > 0)
        self.set(result, total)

    def do_lop3(self, kinds, o):
        at = 1 if re.fullmatch(r"U?P\d", o[0]) else 0
        a, b, c = (self.get(word) for word in o[at + 1 : at + 4])
        table = int(o[at + 4], 16)
        if table == 0xC0 and 0 in (a, b):
            value = 0
        elif None in (a, b, c):
            value = None
        else:
            value = 0
            for index in range(8):
                if table >> index & 1:
                    value |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
            value &= MASK
        self.set(o[at], value)
        if at:
            self.set_predicate(o[0], None if value is None else value != 0)

    def do_plop3(self, kinds, o):
        values = [self.test(word) for word in o[2:5]]
        table = int(o[5], 16)
        if table == 0x80:
            result = False if False in values else None if None in values else True
        elif None in values:
            result = None
        else:
            result = bool(table >> (values[0] << 2 | values[1] << 1 | values[2]) & 1)
        self.set_predicate(o[0], result)

    def do_prmt(self, kinds, o):
        a, choice, b = (self.get(word) for word in o[1:4])
        if None in (a, choice, b):
            return self.set(o[0], None)
        data = [a >> 8 * i & 255 for i in range(4)] + [b >> 8 * i & 255 for i in range(4)]
        self.set(o[0], sum(data[choice >> 4 * i & 7] << 8 * i for i in range(4)))

    def do_sel(self, kinds, o):
        test = self.test(o[3])
        self.set(o[0], None if test is None else self.get(o[1] if test else o[2]))

    def do_isetp(self, kinds, o):
        a, b = self.get(o[2]), self.get(o[3])
        result: bool | None = None
        if None not in (a, b):
            if "U32" not in kinds:
                a, b = signed(a), signed(b)
            result = {"EQ": a == b, "NE": a != b, "LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b}[kinds[0]]
            if "EX" in kinds and a == b:
                result = self.test(o[5])
            elif "EX" in kinds and kinds[0] == "NE":
                result = True
        other = self.test(o[4])
        if "OR" in kinds:
            both = True if True in (result, other) else None if None in (result, other) else False
        else:
            both = False if False in (result, other) else None if None in (result, other) else True
        self.set_predicate(o[0], both)

    def do_p2r(self, kinds, o):
        mask, value = int(o[-1], 16), 0
        for place in range(7):
            if mask >> place & 1:
                test = self.test(f"P{place}")
                if test is None:
                    return self.set(o[0], None)
                value |= test << place
        self.set(o[0], value)

    def do_r2p(self, kinds, o):
        mask, value = int(o[-1], 16), self.get(o[1])
        for place in range(7):
            if mask >> place & 1:
                self.set_predicate(f"P{place}", None if value is None else bool(value >> place & 1))

    def do_iabs(self, kinds, o):
        value = self.get(o[1])
        self.set(o[0], None if value is None else abs(signed(value)))

    # Division by a value of run time: through floats.
    def do_i2f(self, kinds, o):
        value = self.get(o[1])
        self.set(o[0], None if value is None else struct.unpack("<I", struct.pack("<f", float(value)))[0])

    def do_mufu(self, kinds, o):
        value = self.get(o[1])
        if kinds[0] != "RCP" or value is None:
            return self.set(o[0], None)
        real = 1 / struct.unpack("<f", struct.pack("<I", value))[0]
        self.set(o[0], struct.unpack("<I", struct.pack("<f", real))[0])

    def do_f2i(self, kinds, o):
        value = self.get(o[1])
        self.set(o[0], None if value is None else int(struct.unpack("<f", struct.pack("<I", value))[0]))
