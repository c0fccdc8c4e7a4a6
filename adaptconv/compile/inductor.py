"""The torch.compile backend "adaptconv": rewrite the dynamo graph, then stock Inductor."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.torch_version import TorchVersion

from adaptconv._version import __version__
from adaptconv.compile.judging import SiteReport
from adaptconv.compile.rewrite import copied, rewrite

LOG_OPTION = "adaptconv.log"
Compiled = Callable[..., Any]


class SiteLog:
    """The sites of one optimized model, gathered as its graphs are compiled."""

    _ids = itertools.count()

    def __init__(self) -> None:
        self.id = next(self._ids)
        self.graphs = 0
        self._sites: dict[tuple[str, str, str, object], SiteReport] = {}

    def add(self, reports: Sequence[SiteReport]) -> None:
        """Note the sites of one more graph; a site compiled again replaces its earlier answer."""
        self.graphs += 1
        for report in reports:
            self._sites[report.where, report.source, report.kind, report.problem] = report

    def clear(self) -> None:
        """Forget everything: the graphs are about to be compiled anew."""
        self.graphs = 0
        self._sites.clear()

    @property
    def sites(self) -> list[SiteReport]:
        """The sites, in the order in which they were first met."""
        return list(self._sites.values())


_LOGS: weakref.WeakValueDictionary[int, SiteLog] = weakref.WeakValueDictionary()


def new_log() -> SiteLog:
    """A log that the backend can find again by its id."""
    log = SiteLog()
    _LOGS[log.id] = log
    return log


class AdaptConvBackend:
    """A dynamo backend; one instance serves every model, so that equal graphs stay equal."""

    __name__ = "adaptconv"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Compiled:
        """Rewrite and compile one graph.

        Args:
            gm: the dynamo graph.
            example_inputs: its fake inputs.
            kwargs: ``mode`` and ``options`` as ``torch.compile`` passes them; others are ignored.
        """
        options = dict(kwargs.get("options") or {})
        log = _LOGS.get(options.pop(LOG_OPTION, -1))
        if kwargs.get("mode") not in (None, "default"):
            options = {**torch._inductor.list_mode_options(kwargs["mode"]), **options}
        as_given = copied(gm)
        with torch._inductor.config.patch(options):  # freezing and layouts decide what pays
            reports = rewrite(gm)
        if log is not None:
            log.add(reports)
        missing = _missing_toolchain(example_inputs)
        if missing:
            warnings.warn(f"adaptconv: {missing}; the rewritten graph runs uncompiled", RuntimeWarning, stacklevel=2)
            return gm.forward
        if not any(report.rewritten for report in reports):
            return _compiled(gm, example_inputs, options)
        try:
            # The backward too, now: compiled at its first call, it would fail where nothing can be done about it.
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                return _compiled(gm, example_inputs, options)
        except Exception as error:  # noqa: BLE001 - torch's of whatever kind: the user's own graph may do
            failure = f"the rewritten graph did not compile: {type(error).__name__}: {error}"
            warnings.warn(f"adaptconv: {failure}; it is compiled as it was", RuntimeWarning, stacklevel=2)
            compiled = _compiled(as_given, example_inputs, options)
        if log is not None:
            log.add([replace(report, rewritten=False, reason=failure) for report in reports])
        return compiled

    def reset(self) -> None:
        """Forget what Inductor keeps between graphs: the trees of its CUDA graphs."""
        if torch.cuda.is_initialized():
            from torch._inductor.cudagraph_trees import reset_cudagraph_trees

            reset_cudagraph_trees()


def _compiled(gm: fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any]) -> Compiled:
    options = {**options, **_safe_options(example_inputs)}
    # What an op of ours is traced into is this release's code, of which the caches on disk see the name alone.
    tag = f"{torch.compiler.config.cache_key_tag}adaptconv-{__version__}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        compiled: Compiled = torch._inductor.compile(gm, list(example_inputs), options=options)
    return compiled


def _safe_options(example_inputs: Sequence[Any]) -> dict[str, Any]:
    """Options that keep Inductor from kernels known to be wrong.

    Before torch 2.13 its Triton convolution, a candidate of max-autotune, answers wrong with 8 warps and says nothing
    (pytorch#173068). It takes no dilation; a plan that writes a kernel's holes out as zeros would let it in.
    """
    kinds = {t.device.type for t in example_inputs if isinstance(t, torch.Tensor)}
    safe = "cuda" not in kinds or TorchVersion(torch.__version__) >= "2.13"
    return {} if safe else {"max_autotune_conv_backends": "ATEN"}


def _missing_toolchain(example_inputs: Sequence[Any]) -> str | None:
    """What Inductor would need on these inputs' devices and does not have, in words."""
    kinds = {t.device.type for t in example_inputs if isinstance(t, torch.Tensor)}
    if "cuda" in kinds:
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not installed, so torch.compile cannot generate GPU code"
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):
        return "no C++ compiler was found, so torch.compile cannot generate CPU code"
    return None


backend = AdaptConvBackend()
