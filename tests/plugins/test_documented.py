"""Every hook, setting and bundled plugin is documented, and config.ini shows the defaults that are in force."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

from gmta import config, hookspecs

ROOT = Path(__file__).parents[2]
HOOKS = [name for name in vars(hookspecs.HookSpecs) if not name.startswith("_")]
PLUGINS = sorted(path.stem for path in (ROOT / "plugins").glob("*.py") if path.stem != "__init__")
SECTIONS = {"gmta": config.Gmta, "tls": config.Tls, "acme": config.Acme, "domains": config.Domains, "limits": config.Limits, "queue": config.Queue,
            "plugins": config.Plugins, "dns": config.Dns, "tlsrpt": config.TlsReports, "metrics": config.MetricsSection, "listener:mx": config.Listener}


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_has_its_signature_in_the_docs(hook: str) -> None:
    parameters = [name for name in inspect.signature(getattr(hookspecs.HookSpecs, hook)).parameters if name != "self"]
    assert f"## `{hook}({', '.join(parameters)})`" in (ROOT / "docs/hooks.md").read_text()


@pytest.mark.parametrize("section", SECTIONS)
def test_key_is_in_the_docs_and_in_config_ini(section: str) -> None:
    docs = (ROOT / "docs/configuration.md").read_text()
    shipped = (ROOT / "config.ini").read_text()
    part = shipped.split(f"\n[{section}]\n")[1].split("\n[")[0]
    for name, field in SECTIONS[section].model_fields.items():
        key = field.alias or name
        assert f"| `{key}` |" in docs
        assert re.search(rf"^(# )?{key} =", part, re.M), key


def test_defaults_shown_in_config_ini_are_in_force(tmp_path: Path) -> None:
    """Switching on every commented key changes nothing."""
    lines: list[str] = []
    keys: set[str] = set()
    for line in (ROOT / "config.ini").read_text().splitlines():
        if line.startswith("["):
            keys.clear()
        shown = re.match(r"# ([a-z_]+) = \S", line)
        if shown and shown[1] not in keys and shown[1] != "include":
            line = line[2:]
        keys.add(line.partition(" =")[0])
        lines.append(line)
    (tmp_path / "config.ini").write_text("\n".join(lines))
    (tmp_path / "plain.ini").write_text((ROOT / "config.ini").read_text())
    plain, full = config.load(str(tmp_path / "plain.ini")), config.load(str(tmp_path / "config.ini"))
    for section, model in SECTIONS.items():
        for key in model.model_fields:
            assert getattr(of(plain, section), key) == getattr(of(full, section), key), (section, key)
    assert plain.listeners == full.listeners


def of(loaded: config.Config, section: str) -> object:
    kind, _, name = section.partition(":")
    return loaded.listeners[name] if kind == "listener" else getattr(loaded, section)


@pytest.mark.parametrize("section", SECTIONS)
def test_keys_shown_empty_in_config_ini_are_empty_by_default(section: str) -> None:
    part = (ROOT / "config.ini").read_text().split(f"\n[{section}]\n")[1].split("\n[")[0]
    fields = {field.alias or name: field for name, field in SECTIONS[section].model_fields.items()}
    for key in re.findall(r"^# ([a-z_]+) =$", part, re.M):
        assert not fields[key].get_default(call_default_factory=True), key


def test_every_page_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in sorted((ROOT / "docs").glob("*.md")) if f"(docs/{page.name})" not in readme] == []


@pytest.mark.parametrize("name", PLUGINS)
def test_plugin_says_what_it_does(name: str) -> None:
    module = importlib.import_module(f"gmta_plugins.{name}")
    assert module.__doc__
    assert "Hook" in module.__doc__
    assert "Repl" in module.__doc__ or "550" in module.__doc__
    for field in getattr(module, "Config", hookspecs.PluginConfig).model_fields:
        if field not in hookspecs.PluginConfig.model_fields:
            assert f"| `{field}` |" in (ROOT / "docs/configuration.md").read_text(), field
