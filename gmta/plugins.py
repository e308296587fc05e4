"""Finds plugins, makes those that the configuration enables, and calls their hooks, each behind its own fence.

pluggy marks, registers and validates; the calls are made here, so that every one has a deadline, a timing, an error
policy and a log line. What a hook means for the dialogue is the pipeline's affair. Construction raises ConfigError with
everything that is wrong. Afterwards a plugin that raises, hangs or returns nonsense becomes a deferral (or nothing, with
`on_error = ignore`), never more: `check` and `permit` return the deferring Verdict, `edit` and signatures raise
PluginFailure. GreenletExit and the Timeouts of callers pass through. A plugin that never yields to the event loop can't
be interrupted; the worker's watchdog is for that.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import pluggy
from gevent import Timeout, get_hub, getcurrent
from pydantic import BaseModel, ConfigDict

from gmta.config import TARGETS, TRANSPORT_KEYS, Config, ConfigError, Section, nearest
from gmta.hookspecs import HOOKS, PROJECT, HookSpecs, PluginConfig, Transport
from gmta.mail.message import Message
from gmta.mail.reply import AUTH_TEMPORARY, LOCAL_ERROR, Reply
from gmta.mail.verdict import Kind, Verdict

FENCE_TICK_S = 0.05
GROUP = "gmta.plugins"  # entry points of other packages
BUNDLED = "gmta_plugins"  # the package of the bundled ones, looked into without naming any

_FAILED: Any = object()
_DEFER = Verdict(Kind.DEFER, LOCAL_ERROR)
_DEFER_AUTH = Verdict(Kind.DEFER, AUTH_TEMPORARY)


class Overdue(BaseException):
    """A hook's deadline has passed: thrown into its greenlet. One object a call; past all that a plugin may catch by habit."""

    def __init__(self, deadline: float, greenlet: Any) -> None:
        super().__init__()
        self.deadline = deadline
        self.greenlet = greenlet


class _Fences:
    """The deadlines of hooks that run now, looked at a few times a second: most hooks end at once, and a timer for each costs
    more than they do.

    Not services.deadlines: a hook is cut by an exception thrown into its greenlet, which only the hub may do (whoever throws runs on only
    when the other one yields to him), and five times as often as thousands of waiting sockets can be looked through."""

    def __init__(self) -> None:
        self._running: set[Overdue] = set()
        self._timer: Any = None
        self._looking = False

    def enter(self, deadline: float) -> Overdue:
        """Begins to watch the current greenlet; deadline: perf_counter seconds."""
        fence = Overdue(deadline, getcurrent())
        self._running.add(fence)
        if not self._looking:
            self._looking = True
            if self._timer is None:
                self._timer = get_hub().loop.timer(FENCE_TICK_S, FENCE_TICK_S, ref=False)
            self._timer.again(self._look)
        return fence

    def leave(self, fence: Overdue) -> None:
        """The hook is over."""
        self._running.discard(fence)

    def _look(self) -> None:
        """In the hub: throws into greenlets that are late; each of them waits, or it would not be this one's turn."""
        if not self._running:
            self._looking = False
            self._timer.stop()
            return
        now = time.perf_counter()
        for fence in [fence for fence in self._running if fence.deadline <= now]:
            if fence in self._running:
                self._running.discard(fence)
                fence.greenlet.throw(fence)

    def close(self) -> None:
        """Stops looking."""
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None


class PluginFailure(Exception):
    """A plugin failed where that must stop the mail; `reply` is what the client gets."""

    def __init__(self, plugin: str, hook: str, reply: Reply = LOCAL_ERROR) -> None:
        super().__init__(f"plugin {plugin} failed in {hook}")
        self.plugin = plugin
        self.hook = hook
        self.reply = reply


class FoundPlugin:
    """A plugin that could be enabled: name, where it is, and its module, imported when it is first asked for."""

    __slots__ = ("_load", "_module", "enabled", "name", "where")

    def __init__(self, name: str, where: str, load: Callable[[], ModuleType]) -> None:
        self.name = name
        self.where = where
        self.enabled = False
        self._load = load
        self._module: ModuleType | None = None

    @property
    def module(self) -> ModuleType:
        """The module; raises whatever its import raises."""
        if self._module is None:
            self._module = self._load()
        return self._module

    @property
    def doc(self) -> str:
        """The module's docstring, or why it can't be imported."""
        try:
            return (self.module.__doc__ or "").strip()
        except Exception as error:
            return f"can't be imported: {error}"

    @property
    def config(self) -> type[PluginConfig]:
        """The class of its keys."""
        made: type[PluginConfig] = getattr(self.module, "Config", PluginConfig)
        return made


class _Call:
    """One plugin's implementation of one hook."""

    __slots__ = ("function", "hook", "ignore", "judge", "measure", "plugin", "timeout_s", "timing")

    def __init__(self, plugin: str, hook: str, function: Callable[..., Any], config: PluginConfig,
                 judge: Callable[[Any], str | None], timing: list[float], measure: Any) -> None:
        self.plugin = plugin
        self.hook = hook
        self.function = function
        self.timeout_s = config.timeout
        self.ignore = config.on_error == "ignore"
        self.judge = judge
        self.timing = timing
        self.measure = measure


class _NoKeys(BaseModel):
    """The Config of a transport that has none."""

    model_config = ConfigDict(extra="forbid")


class PluginManager:
    """The enabled plugins.

    transports: section name -> Transport.  timings: (plugin, hook) -> [calls, seconds in all, seconds of the longest].
    services, log, metrics: handed to plugins, and where failures and timings go; metrics may be None.
    """

    def __init__(self, config: Config, services: Any, log: Any, metrics: Any = None) -> None:
        self.transports: dict[str, Transport] = {}
        self.timings: dict[tuple[str, str], list[float]] = {}
        self._config = config
        self._services = services
        self._log = log
        self._metrics = metrics
        self._calls: dict[str, tuple[_Call, ...]] = {}
        self._fences = _Fences()
        self._plugins: dict[str, tuple[Any, PluginConfig]] = {}
        self._registry = pluggy.PluginManager(PROJECT)
        self._registry.add_hookspecs(HookSpecs)
        self._spec_names = {name: self._argument_names(name) for name in HOOKS}
        self._found = find(config.plugins.path)
        errors: list[str] = []
        self._enable(errors)
        self._build_calls()
        self._make_transports(errors)
        if errors:
            self.close()
            raise ConfigError(list(dict.fromkeys(errors)))

    # --- finding and making -------------------------------------------------------------------------------------

    def _argument_names(self, hook: str) -> tuple[str, ...]:
        spec = getattr(self._registry.hook, hook).spec
        return tuple(spec.argnames)

    def _enable(self, errors: list[str]) -> None:
        """Makes and registers what [plugins] enable names, in that order."""
        plugins = self._config.sections.get("plugins") or Section("plugins", self._config.file)
        for name in self._config.plugins.enable:
            found = self._found.get(name)
            if found is None:
                errors.append(f"{plugins.where('enable')}: no plugin is named {name}{nearest(name, self._found)}")
            elif found.enabled:
                errors.append(f"{plugins.where('enable')}: {name} is named twice")
            else:
                found.enabled = True
                made = self._make(found, errors)
                if made is not None:
                    self._register(name, *made, errors)
        for name, section in self._config.plugin.items():
            if name not in self._found:
                errors.append(f"{section.where()}: no plugin is named {name}{nearest(name, self._found)}")

    def _make(self, found: FoundPlugin, errors: list[str]) -> tuple[Any, PluginConfig] | None:
        """The plugin and its settings, or None with the errors noted."""
        section = self._config.plugin.get(found.name) or Section(f"plugin:{found.name}", self._config.file)
        try:
            module = found.module
            made = getattr(module, "Plugin", None)
            if not isinstance(made, type):
                errors.append(f"plugin {found.name} ({found.where}): has no class Plugin")
                return None
            if not (isinstance(found.config, type) and issubclass(found.config, PluginConfig)):
                errors.append(f"plugin {found.name} ({found.where}): its Config is no PluginConfig")
                return None
            settings = self._config.validate(found.config, section)
            return made(settings, self._services), settings
        except ConfigError as error:
            errors += error.errors
        except Exception as error:
            self._log.error("plugin can't start", plugin=found.name, traceback=traceback.format_exc())
            errors.append(f"plugin {found.name} ({found.where}): can't start: {type(error).__name__}: {error}")
        return None

    def _register(self, name: str, plugin: Any, settings: PluginConfig, errors: list[str]) -> None:
        """Lets pluggy judge the plugin's hooks."""
        try:
            self._registry.register(plugin, name)
        except pluggy.PluginValidationError as error:
            errors.append(f"plugin {name}: {error}")
            return
        self._plugins[name] = (plugin, settings)
        for caller in self._registry.get_hookcallers(plugin) or ():
            if caller.name not in HOOKS:
                errors.append(f"plugin {name}: there is no hook {caller.name}{nearest(caller.name, HOOKS)}")
            for impl in caller.get_hookimpls():
                if impl.plugin_name == name and (impl.tryfirst or impl.trylast or impl.hookwrapper or impl.wrapper):
                    errors.append(f"plugin {name}: {caller.name}: the order of [plugins] enable is the only one")

    def _build_calls(self) -> None:
        """One tuple of calls a hook that somebody implements."""
        for hook in HOOKS:
            impls = {impl.plugin_name: impl for impl in getattr(self._registry.hook, hook).get_hookimpls()}
            calls = []
            for name, (_, settings) in self._plugins.items():
                impl = impls.get(name)
                if impl is None:
                    continue
                function = _adapted(impl.function, tuple(impl.argnames), self._spec_names[hook])
                timing = self.timings.setdefault((name, hook), [0, 0.0, 0.0])
                measure = None if self._metrics is None else self._metrics.histogram("plugin_seconds", plugin=name, hook=hook)
                calls.append(_Call(name, hook, function, settings, self._judge(hook), timing, measure))
            if calls:
                self._calls[hook] = tuple(calls)

    def _make_transports(self, errors: list[str]) -> None:
        """The transport of every [transport:NAME], from enabled plugins first, then from any that is found."""
        wanted = {section.get("type", "") for section in self._config.transports.values()}
        types: dict[str, Any] = {}
        for name, (plugin, _) in self._plugins.items():
            self._offer(name, plugin, types, errors)
        # a plugin named like the type is asked first: most files then need not be imported at all
        for name in sorted(self._found, key=lambda name: (name not in wanted, name)):
            if wanted <= types.keys():
                break
            found = self._found[name]
            if found.enabled:
                continue
            try:
                offers = hasattr(getattr(found.module, "Plugin", None), "get_transports")
            except Exception as error:
                self._log.warning("plugin can't be imported", plugin=name, reason=f"{type(error).__name__}: {error}")
                continue
            if offers:
                trouble: list[str] = []
                made = self._make(found, trouble)
                if made is not None:
                    self._offer(name, made[0], types, trouble)
                if name in wanted or name in self._config.plugin:
                    errors += trouble
        for name, section in self._config.transports.items():
            kind = section.get("type", "")
            factory = types.get(kind)
            if factory is None:
                errors.append(f"{section.where('type')}: expected a transport that a plugin has, "
                              f"not {kind!r}{nearest(kind, types)}")
                continue
            try:
                settings = self._config.validate(getattr(factory, "Config", _NoKeys), section, ignore=TRANSPORT_KEYS)
                self.transports[name] = factory(name, settings, self._services)
            except ConfigError as error:
                errors += error.errors
            except Exception as error:
                self._log.error("transport can't start", transport=name, traceback=traceback.format_exc())
                errors.append(f"{section.where()}: can't start: {type(error).__name__}: {error}")

    def _offer(self, name: str, plugin: Any, types: dict[str, Any], errors: list[str]) -> None:
        """Notes the transport types that a plugin has."""
        offer = getattr(plugin, "get_transports", None)
        if offer is None:
            return
        try:
            value = offer(*([self._config] if inspect.signature(offer).parameters else []))  # a hook may take fewer
        except Exception as error:
            self._log.error("plugin failed", plugin=name, hook="get_transports", traceback=traceback.format_exc())
            errors.append(f"plugin {name}: get_transports: {type(error).__name__}: {error}")
            return
        complaint = None if value is None else _judge_transports(value)
        if complaint is not None:
            errors.append(f"plugin {name}: get_transports: {complaint}")
        else:
            for kind, factory in (value or {}).items():
                types.setdefault(kind, factory)

    # --- calling ------------------------------------------------------------------------------------------------

    def has(self, hook: str) -> bool:
        """True where a plugin implements the hook."""
        return hook in self._calls

    def check(self, hook: str, *args: Any) -> Any:
        """The first objection, or None. check_message may also give {recipient: Verdict}, of all plugins together."""
        calls = self._calls.get(hook)
        if calls is None:
            return None
        some: dict[Any, Verdict] | None = None
        for call in calls:
            value = self._run(call, args)
            if value is None:
                continue
            if value is _FAILED:
                return _DEFER
            if isinstance(value, Verdict):
                return value
            some = {**value, **(some or {})}
        return some or None

    def permit(self, hook: str, *args: Any) -> Verdict | None:
        """The first answer, or None where nobody has one."""
        for call in self._calls.get(hook, ()):
            value = self._run(call, args)
            if value is _FAILED:
                return _DEFER_AUTH if hook == "permit_auth" else _DEFER
            if value is not None:
                verdict: Verdict = value
                return verdict
        return None

    def get(self, hook: str, *args: Any) -> list[tuple[str, Any]]:
        """(plugin, value) of all that contribute. Raises PluginFailure where a signature can't be made."""
        values: list[tuple[str, Any]] = []
        for call in self._calls.get(hook, ()):
            value = self._run(call, args)
            if value is _FAILED:
                if hook == "get_signatures":
                    raise PluginFailure(call.plugin, hook)
            elif value is not None:
                values.append((call.plugin, value))
        return values

    def edit(self, hook: str, session: Any, transaction: Any, message: Message) -> Message:
        """The message as the plugins leave it. Raises PluginFailure."""
        for call in self._calls.get(hook, ()):
            said = len(transaction.changes)
            value = self._run(call, (session, transaction, message))
            if value is _FAILED:
                raise PluginFailure(call.plugin, hook)
            if value is not None:
                message = value
                if len(transaction.changes) == said:
                    transaction.changes.append(f"rewritten by {call.plugin}")
        return message

    def on(self, hook: str, *args: Any) -> None:
        """Tells all that observe."""
        for call in self._calls.get(hook, ()):
            self._run(call, args)

    def _run(self, call: _Call, args: tuple[Any, ...]) -> Any:
        """One call behind its fence: the value, None where a failure is to be ignored, else _FAILED."""
        started = time.perf_counter()
        fence = self._fences.enter(started + call.timeout_s) if call.timeout_s else None
        trace = ""
        try:
            value = call.function(*args)
            if value is None:
                return None
            complaint = call.judge(value)
            if complaint is None:
                return value
        except Timeout:
            raise  # a caller's deadline
        except Overdue as error:
            if error is not fence:
                raise
            complaint, trace = f"past its deadline of {call.timeout_s:g} s", traceback.format_exc()
        except (Exception, SystemExit) as error:  # SystemExit: gevent would end the whole worker
            complaint, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        finally:
            if fence is not None:
                self._fences.leave(fence)
            elapsed_s = time.perf_counter() - started
            timing = call.timing
            timing[0] += 1
            timing[1] += elapsed_s
            if elapsed_s > timing[2]:
                timing[2] = elapsed_s
            if call.measure is not None:
                call.measure.observe(elapsed_s)
        return self._contain(call, complaint, trace)

    def _contain(self, call: _Call, complaint: str, trace: str) -> Any:
        """Logs a failure; None where it is to be ignored, else _FAILED."""
        self._log.error("plugin failed", plugin=call.plugin, hook=call.hook, reason=complaint, traceback=trace)
        if self._metrics is not None:
            self._metrics.counter("plugin_failures", plugin=call.plugin, hook=call.hook).inc()
        return None if call.ignore else _FAILED

    # --- what values may be -------------------------------------------------------------------------------------

    def _judge(self, hook: str) -> Callable[[Any], str | None]:
        """What tells why a hook's value (not None) can't be taken, or None where it can."""
        if hook == "check_message":
            return _judge_check_message
        if hook == "permit_rcpt":
            return self._judge_permit_rcpt
        named = {"get_size_limit": _judge_size, "get_headers": _judge_fields, "get_signatures": _judge_fields,
                 "get_transports": _judge_transports, "get_route": self._judge_route, "get_auth_mechanisms": _judge_names}
        kinds = {"check": _judge_check, "permit": _judge_permit, "edit": _judge_message, "on": _judge_nothing}
        return named.get(hook) or kinds[hook.partition("_")[0]]

    def _judge_permit_rcpt(self, value: Any) -> str | None:
        complaint = _judge_permit(value)
        if complaint is None and value.transport is not None:
            return self._judge_route(value.transport)
        return complaint

    def _judge_route(self, value: Any) -> str | None:
        if not isinstance(value, str):
            return f"expected a transport's name, not {_shown(value)}"
        known = value in self._config.transports or value in TARGETS
        return None if known else f"no transport is named {value}"

    # --- telling ------------------------------------------------------------------------------------------------

    def explain(self) -> dict[str, list[str]]:
        """Hook -> plugins in the order they are asked, for hooks that somebody implements."""
        return {hook: [call.plugin for call in calls] for hook, calls in self._calls.items()}

    def settings(self, name: str) -> PluginConfig | None:
        """The settings of an enabled plugin."""
        entry = self._plugins.get(name)
        return None if entry is None else entry[1]

    def plugin(self, name: str) -> Any:
        """An enabled plugin itself, or None."""
        entry = self._plugins.get(name)
        return None if entry is None else entry[0]

    def found(self) -> list[FoundPlugin]:
        """All that could be enabled, by name."""
        return [self._found[name] for name in sorted(self._found)]

    def close(self) -> None:
        """Closes transports and plugins that have something to close."""
        self._fences.close()
        plugins = ((name, plugin) for name, (plugin, _) in self._plugins.items())
        for what, named in (("transport", self.transports.items()), ("plugin", plugins)):
            for name, one in named:
                close = getattr(one, "close", None)
                if close is not None:
                    try:
                        close()
                    except Exception:
                        self._log.error(f"{what} can't close", **{what: name}, traceback=traceback.format_exc())


# --- finding ----------------------------------------------------------------------------------------------------


def find(folders: list[str]) -> dict[str, FoundPlugin]:
    """All plugins by name: bundled, entry points, then *.py in `folders`; a later one takes an earlier one's place."""
    found: dict[str, FoundPlugin] = {}
    spec = importlib.util.find_spec(BUNDLED)
    if spec is not None and spec.submodule_search_locations is not None:
        for info in pkgutil.iter_modules(list(spec.submodule_search_locations)):
            if not info.name.startswith("_"):
                module = f"{BUNDLED}.{info.name}"
                found[info.name] = FoundPlugin(info.name, "bundled", lambda module=module: importlib.import_module(module))  # type: ignore[misc]
    for point in entry_points(group=GROUP):
        if not point.module.startswith(f"{BUNDLED}."):
            found[point.name] = FoundPlugin(point.name, point.value, point.load)
    for folder in folders:
        for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            name, extension = os.path.splitext(file)
            if extension == ".py" and name.isidentifier() and not name.startswith("_"):
                path = os.path.join(folder, file)
                found[name] = FoundPlugin(name, path, lambda name=name, path=path: _import_file(name, path))  # type: ignore[misc]
    return found


def _import_file(name: str, path: str) -> ModuleType:
    """The module of a file, under a name of its own; raises whatever its import raises."""
    full = f"gmta_plugin_{name}"
    spec = importlib.util.spec_from_file_location(full, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module  # dataclasses and pydantic look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(full, None)
        raise
    return module


def _adapted(function: Callable[..., Any], takes: tuple[str, ...], given: tuple[str, ...]) -> Callable[..., Any]:
    """`function` for the hook's whole list of arguments where it takes only some."""
    if takes == given:
        return function
    places = tuple(given.index(name) for name in takes)

    def adapted(*args: Any) -> Any:
        return function(*[args[place] for place in places])

    return adapted


def _shown(value: Any) -> str:
    """A value for a log line, by its type: its repr is the plugin's code, and may be long."""
    return f"a value of type {type(value).__name__}"


def _judge_check(value: Any) -> str | None:
    if not isinstance(value, Verdict):
        return f"expected a Verdict or None, not {_shown(value)}"
    return "a check_ hook can't accept" if value.kind is Kind.ACCEPT else None


def _judge_check_message(value: Any) -> str | None:
    if isinstance(value, dict):
        return next((complaint for verdict in value.values() if (complaint := _judge_check(verdict))), None)
    return _judge_check(value)


def _judge_permit(value: Any) -> str | None:
    if not isinstance(value, Verdict):
        return f"expected a Verdict or None, not {_shown(value)}"
    return "a permit_ hook can't disconnect" if value.kind is Kind.DISCONNECT else None


def _judge_size(value: Any) -> str | None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return None if good else f"expected a number of octets, not {_shown(value)}"


def _judge_fields(value: Any) -> str | None:
    if not isinstance(value, (list, tuple)):
        return f"expected a list of (name, value), not {_shown(value)}"
    for field in value:
        if not isinstance(field, tuple) or len(field) != 2:
            return f"expected (name, value), not {_shown(field)}"
        if not isinstance(field[0], str) or not isinstance(field[1], (str, bytes)):
            return "expected text for a field's name and value"
        try:
            Message.from_bytes(b"").prepend(field[0], field[1])
        except ValueError as error:  # a line end in a value would make a second field
            return str(error)
    return None


def _judge_transports(value: Any) -> str | None:
    good = isinstance(value, dict) and all(isinstance(kind, str) and callable(made) for kind, made in value.items())
    return None if good else f"expected {{type: Transport class}}, not {_shown(value)}"


def _judge_names(value: Any) -> str | None:
    good = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
    return None if good else f"expected a list of names, not {_shown(value)}"


def _judge_message(value: Any) -> str | None:
    return None if isinstance(value, Message) else f"expected a Message or None, not {_shown(value)}"


def _judge_nothing(value: Any) -> str | None:
    return f"an on_ hook returns nothing, not {_shown(value)}"
