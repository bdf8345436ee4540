"""Where the time of a function goes, operator by operator."""

import torch


def profile(function, runtime, trace):
    """Call function() under torch's profiler. Print the 15 operators that take longest; write the
    timeline to the file `trace`, for ui.perfetto.dev."""
    # On a GPU an operator's time is that of its kernels.
    activities = [torch.profiler.ProfilerActivity.CPU]
    longest_on = "self_cpu_time_total"
    if runtime.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        longest_on = "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        function()
    # Each process profiles, the main one reports.
    runtime.print_main(profiler.key_averages().table(sort_by=longest_on, row_limit=15))
    if runtime.is_main:
        profiler.export_chrome_trace(trace)
        print(f"trace: {trace}")
