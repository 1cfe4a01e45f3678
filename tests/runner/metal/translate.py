"""Metal text to C++: what a header of types and functions cannot express.

Works on preprocessed text, token by token. Address spaces become types, `threadgroup` variables become memory of the
emulator, numbers like `1.0` become floats, and what Metal has not is refused. Lines stay where they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from runner.metal.entry import entry, find_kernel
from runner.metal.tokens import Reader, Token, refuse, tokenise

SPACES = {"device", "constant", "threadgroup", "thread"}
QUALIFIERS = {"const", "volatile", "static", "constexpr"}
INTEGER_WORDS = {"unsigned", "signed", "long", "short", "int", "char"}
SCALARS = ("bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half", "float", "bfloat")
TYPES = {
    *SCALARS,
    *(f"{scalar}{n}" for scalar in SCALARS for n in (2, 3, 4)),
    *(f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *INTEGER_WORDS,
    *("void", "size_t", "ptrdiff_t", "bfloat16_t", "float16_t"),
}
# Metal Shading Language 3, "Metal and C++14", Restrictions; and doors out of Metal that a C++ compiler would open.
ABSENT = {
    *("double", "new", "delete", "goto", "try", "catch", "throw", "typeid", "dynamic_cast", "virtual", "register"),
    *("thread_local", "noexcept", "asm", "std", "emulated"),
}
KEYWORDS = {"kernel", "vertex", "fragment"}
BEFORE_OPERAND = set("(,=[{};?:!~+-*/%<>&|^") | {
    *("return", "&&", "||", "==", "!=", "<=", ">=", "<<", "+=", "-=", "*=", "/="),
}


def translate(text: str) -> str:
    """C++, for `#include "emulated/metal.h"`, of a preprocessed Metal text with one kernel.

    Raises:
        NotMetalError: something in it is not Metal.
    """
    tokens = list(tokenise(text))
    kernel = find_kernel(tokens)
    return f"{_Translator(tokens).run()}\n{entry(kernel)}"


class _Translator:
    def __init__(self, tokens: list[Token]) -> None:
        self._in = Reader(tokens)
        self._out: list[str] = []
        self._types = TYPES | set(_declared_types(tokens))
        self._num_shared = 0
        self._depth = 0
        """Of parentheses."""

    def run(self) -> str:
        while self._in.at < len(self._in.tokens):
            self._step()
        return "".join(self._out)

    def _step(self) -> None:
        """Translate what starts at the next token."""
        token = self._in.get(self._in.at)
        if token.kind == "name":
            self._name(token)
        elif token.kind == "number":
            self._put(number(token))
        elif token.text == "[":
            self._bracket(token)
        elif token.text == "&" and self._is_address():
            self._address()
        else:
            self._depth += (token.text == "(") - (token.text == ")")
            self._put(token.text)

    def _name(self, token: Token) -> None:
        name = token.text
        if name in ABSENT or name.startswith(("__builtin", "__asm")):
            refuse(token, f"'{name}' does not exist in Metal")
        if name in KEYWORDS:
            refuse(token, f"'{name}' is a keyword of Metal")
        if name == "template" and self._in.get(self._in.after(self._in.at + 1)).text == "[":
            self._skip_until(";")  # the instantiation under a host name
        elif name in SPACES:
            self._space(token)
        elif name == "reinterpret_cast":
            self._put("::emulated::recast")
        elif name in self._types:
            self._type_without_space(token)
        else:
            self._put(name)

    def _bracket(self, token: Token) -> None:
        if self._in.get(self._in.at + 1).text == "[":
            self._skip_until("]")
            self._skip_until("]")
        elif self._in.get(self._in.before(self._in.at)).text in BEFORE_OPERAND - {"]"} | {""}:
            refuse(token, "Metal has no lambda expressions")
        else:
            self._put("[")

    # ---- address spaces ----

    def _space(self, token: Token) -> None:
        """`[const] device [const] TYPE` and what it declares."""
        qualifiers = self._take_back_qualifiers()
        self._in.at += 1
        if self._in.next in ("{", ";", ":", "const"):
            before = self._in.get(self._in.before(self._in.before(self._in.at))).text
            if before == ")":
                return  # `thread` after a member function's parameters
        qualifiers |= self._take_qualifiers()
        of = self._take_type(token)
        qualifiers |= self._take_qualifiers()
        storage = "".join(f"{word} " for word in ("static", "constexpr") if word in qualifiers)
        const = "const " if "const" in qualifiers or token.text == "constant" else ""
        self._declare(token, storage=storage, of=const + of)

    def _declare(self, token: Token, *, storage: str, of: str) -> None:
        space, mark = token.text, self._in.next
        if mark == "*":
            self._take()
            if self._in.next == "*":
                refuse(token, "the emulator knows no pointers to pointers")
            pointer = f"{of}*" if space == "thread" else f"::emulated::pointer<::emulated::{space}, {of}>"
            self._out.append(f"{storage}{pointer} ")
        elif mark == "&":
            self._take()
            self._out.append(f"{storage}{of}& ")
        elif mark == "(":
            refuse(token, "the emulator knows no pointers to arrays or functions")
        elif space == "threadgroup":
            self._shared(of)
        elif space == "device":
            refuse(token, "a variable cannot live in device memory")
        elif space == "constant":
            self._out.append(f"static constexpr {of} ")
        else:
            self._out.append(f"{storage}{of} ")

    def _shared(self, of: str) -> None:
        """`threadgroup T a[N][M], b;`: memory of the emulator under the same names."""
        end = ","
        while end == ",":
            name = self._take()
            dims = ""
            while self._in.next == "[":
                dims += self._brackets()
            last = self._take()
            end = last.text
            if name.kind != "name" or end not in (",", ";"):
                refuse(last, f"threadgroup variable '{name.text}': only names and sizes may be declared")
            place, self._num_shared = self._num_shared, self._num_shared + 1
            self._out.append(
                f"using emulated_type_{place} = {of}{dims}; "
                f'auto&& {name.text} = ::emulated::shared<emulated_type_{place}>({place}, "{name.text}"); '
            )

    def _type_without_space(self, token: Token) -> None:
        """Neither a pointer nor a reference may follow."""
        self._put(token.text)
        follower = self._in.after(self._in.at)
        while self._in.get(follower).text in INTEGER_WORDS | {"const"}:
            follower = self._in.after(follower + 1)
        mark = self._in.get(follower).text
        if mark in ("*", "&"):
            refuse(token, f"'{token.text}{mark}' needs an address space, as in 'thread {token.text}{mark}'")

    # ---- `&array[index]` keeps the address space of the array ----

    def _is_address(self) -> bool:
        """Whether an `&` is unary and stands before `name[`."""
        name = self._in.after(self._in.at + 1)
        if self._in.get(name).kind != "name" or self._in.get(self._in.after(name + 1)).text != "[":
            return False
        before = self._in.before(self._in.at)
        if self._in.get(before).text != ")":
            return self._in.get(before).text in BEFORE_OPERAND
        inside = self._in.tokens[self._in.opening_of(before) : before]
        return inside[-1].text == "*" and any(token.text in SPACES for token in inside)

    def _address(self) -> None:
        self._take()
        name = self._take()
        indexes = []
        while self._in.next == "[":
            indexes.append(self._brackets())
        self._out.append(f"::emulated::address({name.text}{''.join(indexes[:-1])}, {indexes[-1][1:-1]})")

    # ---- the stream of tokens ----

    def _put(self, text: str) -> None:
        self._out.append(text)
        self._in.at += 1

    def _take(self) -> Token:
        """The next token; blanks before it are written, so that lines stay where they are."""
        place = self._in.after(self._in.at)
        self._out.extend(token.text for token in self._in.tokens[self._in.at : place])
        if place >= len(self._in.tokens):
            refuse(self._in.tokens[-1], "the text ends too early")
        self._in.at = place + 1
        return self._in.get(place)

    def _skip_until(self, mark: str) -> None:
        while self._take().text != mark:
            pass

    def _take_qualifiers(self) -> set[str]:
        found = set()
        while self._in.next in QUALIFIERS:
            found.add(self._take().text)
        return found

    def _take_back_qualifiers(self) -> set[str]:
        """Qualifiers just before the current token, taken back from what was written."""
        found = set()
        place = len(self._out) - 1
        while place >= 0 and (not self._out[place].strip() or self._out[place] in QUALIFIERS):
            if self._out[place] in QUALIFIERS:
                found.add(self._out[place])
                self._out[place] = ""
            place -= 1
        return found

    def _take_type(self, space: Token) -> str:
        first = self._take()
        if first.kind != "name" or first.text in SPACES | {"auto"}:
            refuse(space, f"a type was expected after '{space.text}'")
        name = first.text
        while first.text in INTEGER_WORDS and self._in.next in INTEGER_WORDS:
            name += f" {self._take().text}"
        while self._in.next in ("::", "<"):
            if self._in.next == "<":
                return name + self._angles()
            name += self._take().text + self._take().text
        return name

    def _brackets(self) -> str:
        """The next `[...]`, translated."""
        return self._translated("[", "]")

    def _angles(self) -> str:
        return self._translated("<", ">")

    def _translated(self, opening: str, closing: str) -> str:
        start, depth, first = len(self._out), 0, True
        while depth or first:
            token = self._in.get(self._in.at)
            if self._in.at >= len(self._in.tokens):
                refuse(self._in.tokens[-1], f"no '{closing}' closes a '{opening}'")
            depth += (token.text == opening) - (token.text == closing)
            first = first and not depth
            self._step()
        text = "".join(self._out[start:])
        del self._out[start:]
        return text


def number(token: Token) -> str:
    """A literal as C++ reads it: without a suffix a real number is a float in Metal, `h` is half, `bf` bfloat."""
    text = token.text.lower()
    if text.startswith("0x") or not re.search(r"[.e]|[hf]$", text):
        return token.text
    if text.endswith("bf"):
        return f"::bfloat({text[:-2]}f)"
    if text.endswith("h"):
        return f"::half({text[:-1]}f)"
    if text.endswith("l"):
        refuse(token, f"'{token.text}' is a long double, which does not exist in Metal")
    return text if text.endswith("f") else f"{text}f"


def _declared_types(tokens: list[Token]) -> Iterator[str]:
    """Names that the text itself makes types: typedefs, aliases, structs, template parameters."""
    solid = [token for token in tokens if not token.is_blank]
    for place, token in enumerate(solid[:-2]):
        follower = solid[place + 1]
        is_alias = token.text == "using" and solid[place + 2].text == "="
        if is_alias or (token.text in ("typename", "class", "struct") and follower.kind == "name"):
            yield follower.text
        elif token.text == "typedef":
            end = next(i for i in range(place, len(solid)) if solid[i].text == ";")
            yield solid[end - 1].text
