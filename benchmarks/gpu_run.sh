#!/bin/sh
# Two commands for a GPU that is available for a quarter of an hour. Run them in the repository's root.
#
#   benchmarks/gpu_run.sh measure OUT [options of gpu_suite.py]   at most eight minutes
#   benchmarks/gpu_run.sh inspect OUT                             at most three and a half: compute-sanitizer and ncu
#
# OUT is a folder for results. PYTHON names the interpreter (python3).
set -eu

usage() {
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

[ $# -ge 2 ] || usage
command=$1 out=$2
shift 2
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONUNBUFFERED=1

case $command in
measure)
    # The caches of torch.compile and Triton are saved with the results, so that a second run does not compile again.
    # Their folder is fixed: some entries name others by absolute paths.
    caches="${XDG_CACHE_HOME:-$HOME/.cache}/lfdm-export/gpu-suite"
    mkdir -p "$caches"
    if [ -f "$out/caches.tar.gz" ]; then tar xzf "$out/caches.tar.gz" -C "$caches"; fi
    export TORCHINDUCTOR_CACHE_DIR="$caches/inductor" TRITON_CACHE_DIR="$caches/triton"
    status=0
    timeout 480 "$python" benchmarks/gpu_suite.py --out "$out" "$@" || status=$?
    if [ -n "$(ls "$caches")" ]; then tar czf "$out/caches.tar.gz" -C "$caches" .; fi
    exit $status
    ;;
inspect)
    [ $# -eq 0 ] || usage
    kernels="$python benchmarks/gpu_kernels_once.py"
    status=0
    for tool in memcheck racecheck; do
        # shellcheck disable=SC2086
        timeout 65 compute-sanitizer --error-exitcode 1 --tool $tool --kernel-name kns=lfdm_ $kernels checks \
            >"$out/$tool.txt" 2>&1 || { echo "gpu_run: $tool: exit status $?; see $out/$tool.txt" >&2; status=1; }
    done
    metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
    metrics=$metrics,lts__throughput.avg.pct_of_peak_sustained_elapsed
    metrics=$metrics,l1tex__throughput.avg.pct_of_peak_sustained_elapsed
    metrics=$metrics,sm__warps_active.avg.pct_of_peak_sustained_active
    # shellcheck disable=SC2086
    timeout 60 ncu --clock-control none -k regex:lfdm_ --metrics $metrics $kernels >"$out/ncu.txt" 2>&1 ||
        { echo "gpu_run: ncu: exit status $?; see $out/ncu.txt" >&2; status=1; }
    exit $status
    ;;
*) usage ;;
esac
