"""A saved W&B workspace that compares circuits: preservation against nodes, and over k, expansion and branching.

python -m hagd.tracking.workspace --entity TEAM [--project hagd]   saves it, for which `wandb login` is needed
python -m hagd.tracking.workspace --json FILE                       writes what would be saved; needs no login

Needs hagd[workspaces].
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hagd.errors import ConfigError, HagdError

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME = "HAGD: circuits compared"
PRESERVATION = "validation.preservation"
CONTROLS = ("control.attribution.preservation", "control.random.preservation")
SWEPT = ("transcoder.k", "transcoder.expansion", "hierarchy.branching")


def comparison_workspace(entity: str, project: str) -> Workspace:
    """The view of whole extractions; runs of single stages are filtered out.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    try:
        panels: Any = import_module("wandb_workspaces.reports.v2")  # its names are re-exported without being listed
        import wandb_workspaces.workspaces as workspaces
        from wandb_workspaces.expr import And, Metric
    except ModuleNotFoundError as error:
        raise ConfigError('workspace: expected wandb-workspaces, found none; pip install "hagd[workspaces]"') from error

    def scatter(title: str, x: Any, y: str, **options: Any) -> Any:
        return panels.ScatterPlot(title=title, x=x, y=panels.SummaryMetric(y), **options)

    nodes = panels.SummaryMetric("circuit.nodes")
    kept: dict[str, Any] = {"range_y": (0, 1.05)}
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            workspaces.Section(
                name="Preservation against nodes",
                is_open=True,
                panels=[
                    scatter("circuit", nodes, PRESERVATION, log_x=True, **kept),
                    *(scatter(name.split(".")[1], nodes, name, log_x=True, **kept) for name in CONTROLS),
                    scatter("area under faithfulness (CPR, log size)", nodes, "curve.cpr_log", log_x=True),
                ],
            ),
            *(
                workspaces.Section(
                    name=f"By {key}",
                    is_open=True,
                    panels=[
                        scatter("preservation", panels.Config(key), PRESERVATION, **kept),
                        scatter("area under faithfulness", panels.Config(key), "curve.cpr_log"),
                        scatter("unexplained variance of transcoders", panels.Config(key), "transcoder.fvu"),
                    ],
                )
                for key in SWEPT
            ),
            workspaces.Section(
                name="What matters",
                panels=[panels.ParameterImportancePlot(with_respect_to=PRESERVATION)],
            ),
        ],
        runset_settings=workspaces.RunsetSettings(filters=And(Metric("JobType") == "extract")),
    )


def as_json(workspace: Workspace) -> dict[str, Any]:
    """What is sent to W&B when the workspace is saved."""
    content: dict[str, Any] = json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    return content


def save(workspace: Workspace) -> str:
    """Save the workspace as a new view; returns its page.

    Raises:
        ConfigError: W&B refused; no login, no network, or no such entity or project.
    """
    try:
        return str(workspace.save_as_new_view().url)
    except Exception as error:  # the package lets pass whatever its HTTP client raises
        raise ConfigError(
            f"workspace: W&B did not save it ({type(error).__name__}: {error}); run `wandb login`, and upload a run of "
            f"project {workspace.project} of {workspace.entity} first (wandb sync), or write it with --json"
        ) from error


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="a W&B workspace that compares circuits")
    parser.add_argument("--entity", help="W&B team or user")
    parser.add_argument("--project", default="hagd", help="W&B project, as in tracking.project")
    parser.add_argument("--json", type=Path, help="write the definition to this file instead of saving it")
    options = parser.parse_args()
    if options.entity is None and options.json is None:
        parser.error("--entity TEAM is needed to save; or --json FILE")
    try:
        workspace = comparison_workspace(options.entity or "", options.project)
        if options.json is None:
            print(save(workspace))
        else:
            options.json.write_text(json.dumps(as_json(workspace), indent=1) + "\n")
    except HagdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
