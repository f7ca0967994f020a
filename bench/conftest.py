"""Records in the results what a measured time depends on besides the code."""

from typing import Any

import torch


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpu_capability"] = torch.backends.cpu.get_cpu_capability()


def pytest_configure(config: Any) -> None:
    if hasattr(config.option, "benchmark_columns"):  # pytest-benchmark is installed
        config.option.benchmark_columns = ["median", "iqr", "rounds"]
        config.option.benchmark_sort = "median"
