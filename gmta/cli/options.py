"""What several commands share: the options -c and --json, and how they come to the plugins and the queue of a configuration.

Everything here raises ConfigError where the configuration is bad; the group turns that into exit status 78.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gmta.config import Config
    from gmta.plugins import PluginManager
    from gmta.queue.admin import Admin

config_option = click.option("-c", "--config", "path", metavar="FILE", help="configuration; default $GMTA_CONFIG, ./config.ini, /etc/gmta/config.ini")
json_option = click.option("--json", "as_json", is_flag=True, help="print JSON")


def plugin_manager(config: Config) -> PluginManager:
    """The plugins of a configuration, made as a worker makes them, with nobody to log to."""
    from gmta.plugins import PluginManager
    from gmta.services import Services
    from gmta.services.dns import Resolver
    from gmta.services.log import NullLog
    from gmta.services.metrics import Metrics

    log, metrics = NullLog(), Metrics()
    return PluginManager(config, Services(config, log, metrics, resolver=Resolver.configured(config)), log, metrics)


def queue_admin(config: Config) -> Admin:
    """The operator's side of the queue of a configuration; raises StoreError, sqlite3.Error, PermissionError."""
    from gmta.queue.admin import open_queue

    return open_queue(config.queue.store, config.gmta.data_dir)
