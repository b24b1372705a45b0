"""In the place of MLflow: runs in this process, by id."""

from types import SimpleNamespace

runs = {}
active = None
environment_variables = SimpleNamespace(
    MLFLOW_EXPERIMENT_NAME=SimpleNamespace(name="NONE"),
    MLFLOW_EXPERIMENT_ID=SimpleNamespace(name="NONE"),
    MLFLOW_RUN_ID=SimpleNamespace(name="NONE"),
)


class MlflowClient:
    def __init__(self, _):
        pass

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id="0")

    def create_run(self, experiment_id, run_name):
        run = SimpleNamespace(info=SimpleNamespace(run_id=f"run{len(runs)}"), points={}, params={}, tags={})
        runs[run.info.run_id] = run
        return run

    def get_run(self, run_id):
        data = SimpleNamespace(metrics=runs[run_id].points, params=runs[run_id].params)
        return SimpleNamespace(data=data, info=SimpleNamespace(status="RUNNING"))

    def get_metric_history(self, run_id, name):
        return [SimpleNamespace(step=step) for step in runs[run_id].points[name]]

    def set_terminated(self, *_, **__):
        pass


def start_run(run_id, tags, **_):
    global active
    active = runs[run_id]
    active.tags = tags


def search_runs(experiment_ids, filter_string, output_format):
    name = filter_string.split('"')[1]
    return [run for run in reversed(runs.values()) if run.tags["run_name"] == name]


def log_metrics(metrics, step, **_):
    for name in metrics:
        active.points.setdefault(name, []).append(step)


def log_params(params, **_):
    for name, value in params.items():
        assert active.params.setdefault(name, str(value)) == str(value), f"{name} cannot change"


def get_tracking_uri():
    return "here"


def _nothing(*_, **__):
    pass


set_tracking_uri = set_system_metrics_samples_before_logging = set_system_metrics_sampling_interval = _nothing
end_run = flush_async_logging = _nothing
