"""The response of `/settings`: present and configured values, without secrets. Pure."""

from functools import cache

from headrace.common.config import RunConfig
from headrace.common.config.hot_reload import HOT_RELOADABLE, hot_reloadable_values, with_settings
from headrace.control.http.redaction import redact_secrets
from headrace.control.models.commands import Setting, SettingsResponse
from headrace.control.view.run_monitor import RunView


def settings_response(view: RunView) -> SettingsResponse:
    configured, standing = hot_reloadable_values(view.config), view.desired_state.settings
    try:
        values = hot_reloadable_values(with_settings(view.config, standing.values))
    except ValueError:  # the configuration of a restarted run may contradict earlier changes
        values = configured | {name: value for name, value in standing.values.items() if name in configured}
    return SettingsResponse(
        version=standing.version,
        applied_version=view.applied_version,
        settings={
            name: Setting(value=values[name], configured=configured[name], description=_description(name))
            for name in HOT_RELOADABLE
        },
        config=redact_secrets(view.config.model_dump(mode="json", exclude={"redis_url"})),
    )


@cache
def _description(name: str) -> str:
    section, field = name.split(".")
    annotation = RunConfig.model_fields[section].annotation
    assert annotation is not None
    return str(annotation.model_fields[field].description or "")
