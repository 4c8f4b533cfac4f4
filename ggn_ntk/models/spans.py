"""Which module's forward pass an operation ran in, told by the order in which autograd records."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch.autograd.graph import Node
from torch.nn import Module

from ggn_ntk.process.torch_internals import nodes_recorded, place_of


class Spans:
    """From where to where in the order of recorded operations each call of a module lasts."""

    def __init__(self, model: Module) -> None:
        """Set up for the modules of a model."""
        self._modules = list(model.named_modules())
        self._spans: list[_Span] = []  # in the order in which the calls begin

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Take down the calls that this thread makes meanwhile."""
        thread, running = threading.get_ident(), list[_Span]()
        with ExitStack() as stack:
            for name, module in self._modules:
                # The first hook before and the last behind a call: what the user's own compute belongs to the module.
                enter, leave = partial(self._enter, name, thread, running), partial(self._leave, thread, running)
                stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield

    def module_of(self, node: Node) -> str:
        """Name the innermost module in whose call an operation was recorded; empty for none."""
        place = place_of(node)
        return next((span.name for span in reversed(self._spans) if span.start <= place < span.end), "")

    def _enter(self, name: str, thread: int, running: "list[_Span]", *_: Any) -> None:
        """Begin a call."""
        if threading.get_ident() == thread:
            running.append(_Span(name))
            self._spans.append(running[-1])

    def _leave(self, thread: int, running: "list[_Span]", *_: Any) -> None:
        """End the innermost call."""
        if threading.get_ident() == thread:
            running.pop().end = nodes_recorded()


class _Span:
    """A call of a module."""

    def __init__(self, name: str) -> None:
        """Begin it."""
        self.name, self.start, self.end = name, nodes_recorded(), 0
