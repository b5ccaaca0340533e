"""A bound on chat templates: they come with a stranger's model, and Jinja's sandbox lets them run away.

Before transformers renders a template, `check_template` renders it once with the same messages in
transformers' own environment, changed in one respect: everything that takes time or memory is counted, and
what could make something large is refused before it is made. Nothing else differs, so a template that passes
does the same thing when transformers renders it. The three results that could differ are refused: `random`,
`lipsum` and microseconds.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from time import monotonic
from types import CodeType
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import generate_lorem_ipsum

from foveate import upstream
from foveate.errors import FoveateError

STEPS = 2**19  # turns of loops, calls, operators and comparisons
SIZE = 2**22  # characters and items of one value, beyond those of the messages
TOTAL = 2**26  # characters and items of all values together, beyond those of the messages
SECONDS = 4.0
FORESEEN = 8  # what will be made is estimated from above: this factor is allowed
BITS = 2**16  # of a whole number
WIDTH = 9999  # of a field that a format pads to, and of digits to round to
ARITHMETIC = frozenset(("+", "-", "*", "/", "//", "%", "**"))
PADDING = {"ljust", "rjust", "center", "zfill", "expandtabs", "to_bytes", "indent", "wordwrap", "truncate"}
PADDING |= {"batch", "slice", "tojson"}
# Filters that look at the items of a value, not into them: to count what is inside each time would be slow.
SHALLOW = {"length", "count", "first", "last", "default", "d", "list", "map", "select", "reject", "items"}
SHALLOW |= {"selectattr", "rejectattr", "reverse", "attr", "batch", "slice", "dictsort"}
# Arguments of `apply_chat_template` that no template sees.
NO_VARIABLES = {"chat_template", "tokenize", "return_tensors", "return_dict", "load_audio_from_video"}
NO_VARIABLES |= {"processor_kwargs", "sanitize_control_tokens", "padding", "truncation", "max_length"}
# What Python raises for constants that make no sense.
ODD = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
CODECS = ("utf-8", "utf8", "ascii", "latin-1")


class TooMuch(Exception):
    """A template went beyond a bound."""


class Meter:
    """Counts what one rendering takes. Raises `TooMuch` beyond a bound.

    Args:
        given: characters and items of the messages.
    """

    def __init__(self, given: int = 0) -> None:
        self.size, self.left = SIZE + 4 * given, TOTAL + 64 * given
        self.steps, self.end = STEPS, monotonic() + SECONDS

    def spend(self, made: int = 0) -> bool:
        """One step that makes something of this size; True, so that conditions can contain it."""
        self.steps -= 1
        self.left -= made
        if made > self.size or self.left < 0 or self.steps < 0 or monotonic() > self.end:
            raise TooMuch
        return True

    def foresee(self, size: int) -> None:
        if size > FORESEEN * self.size:
            raise TooMuch

    def measure(self, value: Any, deep: bool = True) -> int:
        """Characters and items of a value, counting what it holds as often as it would be written."""
        size = measured(value, deep, self.size)
        if size > self.size:
            raise TooMuch
        return size


def measured(value: Any, deep: bool = True, most: float = math.inf) -> int:
    """Characters and items of a value and, if `deep`, of all in it; stops counting beyond `most`."""
    waiting, size = [value], 0
    while waiting and size <= most:
        one = waiting.pop()
        if isinstance(one, (str, bytes)):
            size += len(one)
        elif isinstance(one, int):
            size += one.bit_length() // 8
        elif isinstance(one, (list, tuple, set, frozenset, Mapping)):
            size += len(one) + 1
            if deep:
                waiting += [*one.keys(), *one.values()] if isinstance(one, Mapping) else one
    return size


class Counted(ImmutableSandboxedEnvironment):
    """A copy of transformers' environment for one rendering, which counts."""

    intercepted_binops = ARITHMETIC

    @classmethod
    def make(cls, given: int = 0) -> Counted:
        """Args: given: characters and items of the messages."""
        made = object.__new__(cls)
        made.__dict__.update(upstream.template_environment().__dict__)
        made.meter = Meter(given)
        made.optimized = False  # which would compute constants while compiling
        made.cache = None
        made.finalize = made.written
        made.filters = {name: made._counted(name, found) for name, found in made.filters.items()}
        made.tests = {name: made._counted(name, found) for name, found in made.tests.items()}
        return made

    meter: Meter

    def spend(self, size: int) -> bool:
        return self.meter.spend(size)

    def written(self, value: Any) -> Any:
        """What a template writes out."""
        self.meter.spend(self.meter.measure(value))
        return value

    def compared(self, value: Any) -> Any:
        """A side of a comparison."""
        self.meter.measure(value)
        self.meter.spend()
        return value

    def concatenated(self, *values: Any) -> str:
        """The operator `~`, whose parts have been through `written`."""
        return "".join(map(str, values))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._foresee(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        self.meter.spend(self.meter.measure(result, deep=False))
        return result

    def _foresee(self, operator: str, left: Any, right: Any) -> None:
        """Raises `TooMuch` if an operator would make something large."""
        if any(isinstance(one, int) and one.bit_length() > BITS for one in (left, right)):
            raise TooMuch
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > BITS:
                raise TooMuch
        elif operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(one, (str, bytes, list, tuple)) and isinstance(times, int):
                    self.meter.foresee(max(len(one), 1) * max(times, 0))
        elif operator == "%" and isinstance(left, (str, bytes)):
            self._check_format(left, (right,))

    def _check_format(self, given: Any, values: Any) -> None:
        """Raises `TooMuch` for a format that pads to a large width, its own or one of the values."""
        text = given.decode("latin-1") if isinstance(given, bytes) else str(given)
        nested = "*" in text or re.search(r"\{[^{}]*\{", text)
        if re.search(r"\d{5}", text) or (nested and _holds_wide(values)):
            raise TooMuch
        fields = max(1, text.count("{") + text.count("%"))
        self.meter.foresee(len(text) + self.meter.measure(values) * fields + WIDTH * (fields - 1))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # named as in Jinja, so that no keyword of a template is taken for one of these
        __self._foresee_call(__obj, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        __self.meter.spend(__self.meter.measure(result, deep=False))
        return result

    def _foresee_call(self, called: Any, args: Any, kwargs: Any) -> None:
        if called is generate_lorem_ipsum:
            raise TooMuch
        if called is self.globals["strftime_now"] and re.search(r"\d{4}|%\W*f", str((args, kwargs))):
            raise TooMuch
        method = getattr(called, "__wrapped__", called)  # Jinja wraps `format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            self._foresee_use(method.__name__, (owner, *args), kwargs)

    def _foresee_use(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises `TooMuch` if a filter, or a method of its first argument, would make something large."""
        values, meter = [*args, *kwargs.values()], self.meter
        if name in PADDING:
            sizes = [abs(int(one)) if _whole(one) else meter.measure(one) for one in values]
            meter.foresee(math.prod(size + 1 for size in sizes))
        elif name == "replace" and len(values) > 2:
            old, new = str(values[1]), str(values[2])
            meter.foresee(str(values[0]).count(old) * len(new))
        elif name == "join":
            between = max((len(one) for one in values if isinstance(one, (str, bytes))), default=0)
            meter.foresee(max((len(one) for one in values if hasattr(one, "__len__")), default=0) * between)
        elif name == "translate" and len(values) == 2 and isinstance(values[1], Mapping):
            longest = max((len(one) for one in values[1].values() if isinstance(one, str)), default=1)
            meter.foresee(len(values[0]) * longest)
        elif name in ("format", "format_map") and values:
            self._check_format(values[0], values[1:])
        elif name == "sum" and not all(isinstance(one, (int, float, str)) for one in values[1:]):
            meter.foresee(meter.measure(values) ** 2)  # of lists, each sum copies the last
        elif name == "urlize":
            meter.foresee(100 * meter.measure(values[0]))
        elif (
            name == "random"
            or (name == "round" and any(_whole(one) and abs(one) > WIDTH for one in values[1:]))
            or (name in ("encode", "decode") and any(str(one).lower() not in CODECS for one in values[1:]))
        ):
            raise TooMuch

    def _counted(self, name: str, function: Any) -> Callable[..., Any]:
        passed = getattr(function, "jinja_pass_arg", None)  # what Jinja gives it as first argument
        skipped = 0 if passed is None else 1

        def counted(*args: Any, **kwargs: Any) -> Any:
            given = args[skipped:]
            for one in (*given, *kwargs.values()):
                self.meter.measure(one, deep=name not in SHALLOW)
            self._foresee_use(name, given, kwargs)
            result = function(*args, **kwargs)
            self.meter.spend(self.meter.measure(result, deep=False))
            return result

        if passed is not None:
            vars(counted)["jinja_pass_arg"] = passed
        return counted


def _whole(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _holds_wide(values: Any) -> bool:
    """Whether a number among values, or among what they hold, is too large for a width."""
    waiting = [values]
    while waiting:
        one = waiting.pop()
        if isinstance(one, (list, tuple)):
            waiting += one
        elif isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, str):
            if re.search(r"\d{5}", one):
                return True
        elif isinstance(one, int) and abs(one) > WIDTH:
            return True
    return False


def _instrumented(tree: Any) -> nodes.Template:
    """The template with its loops, macros, comparisons and `~` counted."""
    counted: Any = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.Block)
    for loop in list(tree.find_all(counted)):
        text = sum(len(data.data) for data in loop.find_all(nodes.TemplateData))
        loop.body.insert(0, nodes.ExprStmt(_call("spend", nodes.Const(text)), lineno=loop.lineno))
        if isinstance(loop, nodes.For) and loop.test is not None:
            loop.test = nodes.And(_call("spend", nodes.Const(0)), loop.test)
    for comparison in list(tree.find_all(nodes.Compare)):
        comparison.expr = _call("compared", comparison.expr)
        for operand in comparison.ops:
            operand.expr = _call("compared", operand.expr)
    return _with_concatenations(tree)


def _with_concatenations(node: Any) -> Any:
    """Replaces the operator `~` in a tree by a call that counts."""
    for key, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, key, _with_concatenations(value))
        elif isinstance(value, list):
            value[:] = [_with_concatenations(one) if isinstance(one, nodes.Node) else one for one in value]
    if isinstance(node, nodes.Concat):
        return _call("concatenated", *(_call("written", one) for one in node.nodes))
    return node


def _call(name: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


@lru_cache(maxsize=64)
def _compiled(source: str) -> CodeType:
    """A template's code, counted. Raises `TooMuch` if one of its constants is large."""
    environment = Counted.make()
    tree = environment.parse(source)
    _check_constants(environment, tree)
    return environment.compile(_instrumented(tree))


def _check_constants(environment: Counted, tree: Any) -> None:
    """Computes what transformers' environment computes while it compiles, also where it is never reached."""
    free: Any = (nodes.Name, nodes.Call, nodes.ContextReference, nodes.NSRef)
    for node in tree.find_all((nodes.BinExpr, nodes.Concat, nodes.Filter, nodes.Test, nodes.Compare)):
        if isinstance(node, (nodes.Filter, nodes.Test)) and node.node is None:
            continue  # of a block
        if isinstance(node, free) or node.find(free) is not None:
            continue
        output = nodes.Output([copy.deepcopy(node, {id(environment): environment})], lineno=node.lineno)
        alone = nodes.Template([output], lineno=node.lineno).set_environment(environment)
        try:
            _template(environment, environment.compile(_instrumented(alone))).render()
        except ODD:  # what does not compute is not computed while compiling
            continue


def _template(environment: Environment, code: CodeType) -> Template:
    return Template.from_code(environment, code, environment.make_globals(None))


def bounded(conversations: Sequence[Any], template: Any, **names: Any) -> Any:
    """The result of `upstream.rendered`, of a template that may run away.

    Raises:
        FoveateError: a template that is broken, or goes beyond a bound.
    """
    given = measured([conversations, names])
    try:
        return upstream.rendered(
            lambda source: _template(Counted.make(given), _compiled(source)), conversations, template, **names
        )
    except (TooMuch, RecursionError, MemoryError) as error:
        raise FoveateError(
            f"the chat template runs away: it takes more than {STEPS} steps, {TOTAL} characters or "
            f"{SECONDS:.0f} seconds, or is not the same each time; name another template"
        ) from error
    except Exception as error:  # whatever Python raises for what the template does
        what = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FoveateError(f"the chat template is broken: {what}; name another template") from error


def check_template(processor: Any, conversations: Sequence[Any], arguments: Mapping[str, Any]) -> None:
    """Raises `FoveateError` if a processor's chat template is broken, or runs away with these conversations.

    Args:
        processor: any processor of transformers.
        conversations: lists of messages.
        arguments: of its `apply_chat_template`.
    """
    template, named = arguments.get("chat_template"), processor.chat_template
    if isinstance(named, dict):
        template = named.get(template or "default", template)
    elif template is None:
        template = named
    names = {name: value for name, value in arguments.items() if name not in NO_VARIABLES}
    bounded(conversations, template, **{**processor.tokenizer.special_tokens_map, **names})


def marked_answers(
    template: str, messages: Sequence[Mapping[str, Any]], **names: Any
) -> list[tuple[int, int]]:
    """Start and end, in characters, of the answers in a chat template's text.

    Args:
        template: Jinja source, with `generation` blocks around answers.
        messages: one conversation.
        **names: further variables of the template.

    Raises:
        FoveateError: as for `bounded`.
    """
    _, ((*spans,),) = bounded([messages], template, return_assistant_tokens_mask=True, **names)
    return spans
