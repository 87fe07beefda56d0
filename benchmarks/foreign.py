"""Defences and classifiers of other people: found by name, wrapped, and tried once.

A name is that of a shipped defence or classifier, ``module:attribute`` or ``path/to/file.py:attribute``.
The folder of a file, or the current folder for modules in it, is appended to Python's search path, so that
their imports work.

A defence is a function of clouds ``(B, N, 3)``, in the unit sphere and z up, to clouds ``(B, M, 3)`` or a
list of clouds ``(M_i, 3)``; an object with such a ``__call__``, such as an `nn.Module`; a class of these,
which is constructed; or an `ifdefense.Purifier`. What it needs is read from its attributes, all optional:

* ``name``: its name in results.
* ``array``: ``"torch"`` or ``"numpy"``; tried once by default.
* ``takes_seed``: whether it has an argument ``seed``; false by default.
* ``deterministic``: whether equal clouds give equal results. It is measured, and the measurement counts.
* ``differentiable``: whether gradients pass; false by default, which means straight-through gradients.
* ``optimises``: whether it runs an optimisation for each cloud; false by default.
* ``num_points``: points of each result, which is brought to it by choosing or repeating points; by default
  results are used as returned.
* ``normalise``: whether results are normalised to the unit sphere before classification; true by default.

A random defence without ``takes_seed`` runs with seeded global generators of PyTorch, NumPy and Python, whose
states are restored after each call.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import classifiers
import ifdefense
from attacks.defence_aware.model import EOT, PurifierLike
from attacks.oracle import Stochastic
from benchmarks.clouds import LabelledClouds, load_clouds
from benchmarks.identity import identity
from ifdefense import Purifier
from ifdefense.arguments import count_of
from ifdefense.console import meant
from ifdefense.devices import device_of_weights
from ifdefense.geometry.axes import AXES, trained_axis
from ifdefense.guard import normal_modes
from ifdefense.logits import classify, frozen
from ifdefense.provenance import digest_of_weights
from ifdefense.purifiers.filters import refilled
from ifdefense.purifiers.registry import LACKING, METHODS, unknown

_LOG = logging.getLogger(__name__)

CPU = torch.device("cpu")
NO_DEFENCE = "none"
FORMS = "module:attribute or path/to/file.py:attribute"


class ForeignError(ValueError):
    """An unusable defence or classifier; the message names it and the reason."""


# Finding


def found(what: str) -> Any:
    """The object that ``module:attribute`` or ``path/to/file.py:attribute`` names.

    Raises:
        ForeignError: if there is no such file, module or attribute, or its import fails.
    """
    place, _, attribute = what.rpartition(":")
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [name for name in vars(value) if not name.startswith("_")]
            raise ForeignError(f"{place} has no {attribute!r}{meant(part, public)}")
        value = getattr(value, part)
    return value


def _file(path: Path) -> Any:
    """A module from a file; read again if the file has changed."""
    if not path.is_file():
        raise ForeignError(f"{path}: there is no such file")
    path = path.resolve()
    status = path.stat()
    return _executed(path, status.st_mtime_ns, status.st_size)


@functools.cache
def _executed(path: Path, changed: int, size: int) -> Any:
    names = (f"foreign_{path.stem}" + f"_{number}" * (number > 0) for number in itertools.count())
    name = next(name for name in names if getattr(sys.modules.get(name), "__file__", str(path)) == str(path))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ForeignError(f"{path}: not a Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for dataclasses and digests of code
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ForeignError(f"{path}: its import fails: {_reason(error)}") from error
    return module


def _module(name: str) -> Any:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ForeignError(f"{name!r} is neither a module nor a Python file: use {FORMS}")
    top = name.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        if not (Path(f"{top}.py").is_file() or Path(top).is_dir()):
            raise ForeignError(f"there is no module {top!r}")
        sys.path.append(str(Path.cwd()))
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ForeignError(f"{name}: its import fails: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Type and first line of an error, and its notes."""
    text = str(error).partition("\n")[0]
    reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return ". ".join([reason, *getattr(error, "__notes__", ())])


def _object(what: Any, name: str) -> Any:
    """An instance, if a class is given."""
    if not isinstance(what, type):
        return what
    try:
        return what()
    except Exception as error:
        raise ForeignError(
            f"{name}: the class cannot be constructed without arguments: {_reason(error)}"
        ) from error


def _name(what: Any, given: str | None) -> str:
    """Its own ``name``, else the attribute that was given, else the name of the function or class."""
    own = getattr(what, "name", None)
    if isinstance(own, str) and own:
        return own
    if given is not None:
        return given.rpartition(":")[2]
    return str(getattr(what, "__name__", type(what).__name__)).strip("<>")


# Defences


class ForeignDefence(nn.Module):
    """A defence of somebody else, as a purifier; see the module's docstring.

    Args:
        call: function or object.
        name: its name in errors and results.
        num_points: points of each result, instead of its attribute.
        probe: ``(B, N, 3)`` clouds on which it is tried.

    Attributes:
        deterministic: as measured.
        differentiable, normalise, optimises: as declared.
        notes: what was measured otherwise than declared.

    Raises:
        ForeignError: if it fails on the probe.
    """

    def __init__(self, call: Callable[..., Any], name: str, num_points: int | None, probe: Tensor) -> None:
        super().__init__()
        if not callable(call):
            raise ForeignError(f"{name}: a defence must be callable, got a {type(call).__name__}")
        self.call, self.name = call, name
        self.num_points = count_of(getattr(call, "num_points", None) if num_points is None else num_points)
        self.takes_seed = bool(getattr(call, "takes_seed", False))
        self.normalise = bool(getattr(call, "normalise", True))
        self.optimises = bool(getattr(call, "optimises", False))
        self.identity = identity(call)  # before it is called, which may change it
        self.notes: tuple[str, ...] = ()
        self.array, returned = self._first_call(probe)
        self.differentiable = bool(getattr(call, "differentiable", False)) and self.array == "torch"
        first, other = self._result(returned, probe, None), self(probe, seed=1)
        self.deterministic = _equal(first, other)
        if not self.deterministic:
            if getattr(call, "deterministic", False):
                self._note("it is declared deterministic, but its results differ between calls")
            if not _equal(first, self(probe)):
                self._note("equal seeds give different results, as it has random numbers of its own")

    def _note(self, text: str) -> None:
        self.notes += (text,)
        _LOG.warning("%s: %s", self.name, text)

    def _first_call(self, probe: Tensor) -> tuple[str, Any]:
        """The declared kind of array, or the first with which a call succeeds, and its result."""
        declared = getattr(self.call, "array", None)
        kinds = ["torch", "numpy"]
        if isinstance(declared, str):
            if declared not in kinds:
                raise ForeignError(f"{self.name}: array must be 'torch' or 'numpy', got {declared!r}")
            kinds = [declared]
        failed = []
        for kind in kinds:
            try:
                return kind, self._called(kind, probe, 0)
            except ForeignError:
                raise
            except Exception as error:
                failed.append(error)
        reasons = " and ".join(
            f"with a {kind} array, {_reason(error)}" for kind, error in zip(kinds, failed, strict=True)
        )
        raise ForeignError(f"{self.name} fails on clouds {tuple(probe.shape)}: {reasons}") from failed[0]

    def _called(self, kind: str, points: Tensor, seed: int) -> Any:
        """The result as returned, for a copy of the points."""
        given = points.clone()
        value = given if kind == "torch" else given.detach().cpu().numpy()
        seeded = {"seed": seed} if self.takes_seed else {}
        # Defences may compute gradients of their own, also where the caller computes none.
        with _seeded(seed, points.device), normal_modes(), torch.enable_grad(), frozen(self):
            returned = self.call(value, **seeded)
        after = given if kind == "torch" else torch.from_numpy(value).to(points)
        if not torch.equal(after, points):
            raise ForeignError(f"{self.name} changes its input: it must work on a copy")
        return returned

    def forward(self, points: Tensor, num_points: int | None = None, seed: int = 0) -> Tensor:
        """Purified clouds ``(B, M, 3)``, of the precision and on the device of the points.

        Args:
            points: ``(B, N, 3)``.
            num_points: size of results that differ in size, by default N; used only then, or if the defence
                declares ``num_points``, which has priority.
            seed: random seed.

        Raises:
            ForeignError: if the defence fails or returns something else than finite clouds.
        """
        try:
            returned = self._called(self.array, points, seed)
        except ForeignError:
            raise
        except Exception as error:
            raise ForeignError(
                f"{self.name} fails on clouds {tuple(points.shape)}: {_reason(error)}"
            ) from error
        return self._result(returned, points, num_points)

    def _result(self, returned: Any, points: Tensor, num_points: int | None) -> Tensor:
        """Checked clouds of one size."""
        clouds = self._checked(returned, points)
        size = self.num_points
        if size is None and len({len(cloud) for cloud in clouds}) > 1:
            size = num_points or points.shape[1]
        if size is not None:
            clouds = [_resized(cloud, size) for cloud in clouds]
        result = torch.stack(clouds)
        return result if torch.is_grad_enabled() and points.requires_grad else result.detach()

    def _checked(self, returned: Any, points: Tensor) -> list[Tensor]:
        """The clouds of a result."""
        wanted = f"it must return clouds ({len(points)}, M, 3) or a list of {len(points)} clouds (M, 3)"
        if not isinstance(returned, Tensor | np.ndarray | list):
            raise ForeignError(f"{self.name} returned a {type(returned).__name__}; {wanted}")
        if len(returned) != len(points):
            raise ForeignError(f"{self.name} returned {len(returned)} clouds for {len(points)}; {wanted}")
        clouds = []
        for index, each in enumerate(returned):
            cloud = torch.from_numpy(np.asarray(each)) if self.array == "numpy" else torch.as_tensor(each)
            if cloud.ndim != 2 or cloud.shape[1] != 3 or not len(cloud):
                raise ForeignError(f"{self.name} returned {tuple(cloud.shape)} for cloud {index}; {wanted}")
            if isinstance(each, Tensor) and each.device != points.device:
                raise ForeignError(
                    f"{self.name} returned clouds on {each.device} for clouds on {points.device}: it must "
                    "compute on the device of its input"
                )
            cloud = cloud.to(points)
            if not cloud.isfinite().all():
                raise ForeignError(f"{self.name} returned NaN or infinite coordinates for cloud {index}")
            clouds.append(cloud)
        return clouds

    def spec(self) -> dict[str, Any]:
        """Description for keys and results: `identity`, weights, and what it declares."""
        declared = ("array", "takes_seed", "deterministic", "differentiable", "normalise", "optimises")
        options = {name: getattr(self, name) for name in (*declared, "num_points")}
        return {
            "class": f"{type(self).__module__}:{type(self).__qualname__}",
            "name": self.name,
            "identity": self.identity,
            "weights": digest_of_weights(self),
            "options": options,
        }


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _resized(cloud: Tensor, size: int) -> Tensor:
    """A cloud of ``size`` of its points, always the same, so that a deterministic defence stays so."""
    return cloud if len(cloud) == size else cloud[refilled(len(cloud), size, 0).to(cloud.device)]


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context with seeded global generators, whose states are restored."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 (theirs, not ours)
    accelerator = device.type != "cpu"
    kind: dict[str, Any] = {"device_type": device.type} if accelerator else {}
    with torch.random.fork_rng(devices=[device.index or 0] if accelerator else [], **kind):
        torch.default_generator.manual_seed(seed)
        if accelerator:
            torch.get_device_module(device).manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


@functools.cache
def tried() -> LabelledClouds:
    """Clouds on which things are tried."""
    return load_clouds(clouds=2, split="validation")


def defence_of(
    what: str | Callable[..., Any] | type | Purifier | None,
    *,
    num_points: int | None = None,
    device: torch.device | None = None,
) -> PurifierLike | None:
    """A defence as a purifier; ``None`` for no defence.

    Args:
        what: ``"none"``, ``None``, a method of `ifdefense.load` or file of its weights, ``module:attribute``,
            ``path/to/file.py:attribute``, or an object, see the module's docstring.
        num_points: points of each result of a foreign defence, instead of what it declares.
        device: where it is tried, and the weights of named ones are moved; by default the CPU, or where the
            weights of an object are.

    Raises:
        ForeignError: if there is no such defence, or it is unusable.
    """
    if what is None or what == NO_DEFENCE:
        return None
    given = None
    if isinstance(what, str):
        if what in METHODS or (Path(what).is_file() and Path(what).suffix != ".py"):
            return ifdefense.load(what, device=device)
        _check_form(what, "defence", [NO_DEFENCE, *METHODS])
        given, what = what, found(what)
    call = _object(what, given or _name(what, None))
    if isinstance(call, ForeignDefence | Purifier):
        return call
    place = _placed(call, given is not None, device)
    return ForeignDefence(call, _name(call, given), num_points, tried().points.to(place))


def _placed(what: Any, named: bool, device: torch.device | None) -> torch.device:
    """Where an object computes; named networks are moved there."""
    if not isinstance(what, nn.Module):
        return device or CPU
    if named:
        what.to(device or CPU)
    return device_of_weights(what)


def _check_form(what: str, kind: str, known: list[str]) -> None:
    """Refuses a name that is neither shipped nor one of the `FORMS`."""
    if what in LACKING:
        raise ForeignError(unknown(what))
    if what.endswith(".py"):
        raise ForeignError(f"{what}: name the {kind} in it, as {what}:NAME")
    if ":" not in what:
        raise ForeignError(
            f"unknown {kind} {what!r}{meant(what, known)}; there are {', '.join(known)}, or {FORMS}"
        )


# Classifiers


@dataclasses.dataclass(frozen=True, eq=False)
class Victim:
    """A classifier.

    Attributes:
        title: its name in results.
        model: the classifier of clouds ``(B, N, 3)``, mean-centred, of largest norm 1 and z up.
        weights: digest of its weights, for foreign ones also of its code.
        classes: number of classes.
        deterministic: whether equal clouds give equal logits.
    """

    title: str
    model: nn.Module
    weights: str
    classes: int
    deterministic: bool = True

    def check(self, clouds: LabelledClouds) -> None:
        """Checks that it knows the classes of clouds.

        Raises:
            ForeignError: if it has fewer or more classes. More are right if the classes have no names: the
                last of them may have no cloud.
        """
        count = len(clouds.classes)
        unnamed = clouds.classes == tuple(map(str, range(count)))
        if self.classes < count or (self.classes > count and not unnamed):
            raise ForeignError(
                f"{self.title} distinguishes {self.classes} classes, {clouds.name} has {len(clouds.classes)}"
            )


def shipped_victims() -> list[str]:
    """Names of the shipped classifiers."""
    folder = Path(classifiers.__file__).parent / "weights"
    return sorted(path.stem for path in folder.glob("*.safetensors"))


def victim_of(
    what: str | nn.Module | Callable[[Tensor], Any] | Victim, *, device: torch.device | None = None
) -> Victim:
    """A classifier as a victim, called once to check its logits.

    Args:
        what: a shipped classifier; ``NETWORK:FILE`` or ``NETWORK:FILE@AXIS`` with a network of
            `classifiers.NETWORKS` and the up axis of its training clouds, such as y for ModelNet40 as HDF5;
            ``module:attribute``, ``path/to/file.py:attribute``; or a network, function or class.
        device: as for `defence_of`.

    Raises:
        ForeignError: if there is no such classifier, or it does not return logits.
        ValueError: if a file of weights cannot be used.
    """
    return _victim(what, "victim", device)


def model_of(
    what: str | nn.Module | Callable[[Tensor], Any] | Victim, *, device: torch.device | None = None
) -> Victim:
    """A classifier that already contains its defence; arguments as `victim_of`.

    If its logits differ between calls, ``model`` is a `RandomModel`.
    """
    return _victim(what, "model", device)


def _victim(what: Any, kind: str, device: torch.device | None) -> Victim:
    if isinstance(what, Victim):
        return what
    given = None
    if isinstance(what, str):
        network, colon, path = what.partition(":")
        if (colon and network in classifiers.NETWORKS) or what in shipped_victims():
            return _ours(what, network, path, device or CPU)
        _check_form(what, kind, shipped_victims())
        given, what = what, found(what)
    title = _name(what, given)
    model = _object(what, title)
    if not callable(model):
        raise ForeignError(f"{title}: a {kind} must be callable, got a {type(model).__name__}")
    place = _placed(model, given is not None, device)
    if isinstance(model, nn.Module):
        model = model.eval() if given else _evaluated(model, title)
    wrapped = ForeignModel(model)
    return _tried(Victim(title, classifiers.upright(wrapped).eval(), wrapped.identity, 0), place)


def _evaluated(model: nn.Module, title: str) -> nn.Module:
    """The model, or a copy in evaluation mode."""
    if not any(part.training for part in model.modules()):
        return model
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:
        raise ForeignError(f"{title} is in training mode and cannot be copied: call eval() first") from error


def _ours(what: str, network: str, path: str, device: torch.device) -> Victim:
    """A shipped classifier, or weights of one of our networks; folded."""
    file, _, up = path.rpartition("@")
    path, axis = (file, up) if up in AXES else (path, None)
    model = classifiers.load(network, path, up=axis) if path else classifiers.load(what)
    title = f"{network}-{Path(path).stem}" if path else what
    folded = classifiers.upright(classifiers.fold(model)).to(device)
    return _tried(Victim(title, folded, digest_of_weights(model), 0), device)


def _tried(victim: Victim, device: torch.device) -> Victim:
    """The victim with its number of classes, after two calls."""
    points = tried().points.to(device)
    given = points.clone()
    try:
        with torch.no_grad(), frozen(victim.model), _seeded(0, device):
            first, second = (classify(victim.model, given) for _ in range(2))
    except Exception as error:
        raise ForeignError(
            f"{victim.title} fails on clouds {tuple(points.shape)}: "
            f"{error if isinstance(error, ValueError) else _reason(error)}"
        ) from error
    if not torch.equal(given, points):
        raise ForeignError(f"{victim.title} changes its input: it must work on a copy")
    if first.device != points.device:
        raise ForeignError(
            f"{victim.title} returned logits on {first.device} for clouds on {points.device}: it must "
            "compute on the device of its input"
        )
    if not first.isfinite().all():
        raise ForeignError(f"{victim.title} returned NaN or infinite logits")
    same = torch.equal(first, second)
    model = victim.model if same else RandomModel(victim.model).eval()
    return dataclasses.replace(victim, model=model, classes=first.shape[1], deterministic=same)


class ForeignModel(nn.Module):
    """A classifier of somebody else, with a description for keys.

    Args:
        call: network or function.
    """

    places_clouds = True
    """See `ifdefense.logits.classify`."""

    def __init__(self, call: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.call, self.identity = call, identity(call)
        self.up_axis = trained_axis(call)

    def forward(self, points: Tensor) -> Tensor:
        """Logits ``(B, C)`` of clouds ``(B, N, 3)``."""
        return classify(self.call, points)

    def spec(self) -> dict[str, Any]:
        """Description for keys."""
        return {
            "class": f"{type(self).__module__}:{type(self).__qualname__}",
            "identity": self.identity,
            "weights": digest_of_weights(self),
        }


class RandomModel(Stochastic):
    """A classifier with random numbers of its own, from seeded global generators.

    Without gradients, the logits are those of ``seed``; with gradients, they are means over draws of
    ``eot``, as in `attacks.DefenceAware`.

    Args:
        model: the classifier.
        seed: seed of its draw.
        eot: draws per gradient.
    """

    places_clouds = True
    """See `ifdefense.logits.classify`."""

    def __init__(self, model: nn.Module, seed: int = 0, eot: EOT | None = None) -> None:
        super().__init__()
        self.model, self.seed, self.eot = model, seed, eot or EOT()
        self._gradients = 0

    def restart(self) -> None:
        """Restarts the draws of ``eot``."""
        self._gradients = 0

    def with_seed(self, seed: int) -> RandomModel:
        """The same model with another draw."""
        return RandomModel(self.model, seed, self.eot).eval()

    def forward(self, points: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        seeds: Iterable[int] = [self.seed]
        if torch.is_grad_enabled() and points.requires_grad:
            seeds = self.eot.seeds(self._gradients)
            self._gradients += 1
        return torch.stack([self._draw(points, seed) for seed in seeds]).mean(0)

    def _draw(self, points: Tensor, seed: int) -> Tensor:
        with _seeded(seed, points.device):
            return classify(self.model, points)
