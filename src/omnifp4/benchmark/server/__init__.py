"""Load on an OpenAI-compatible server, ours or another's: a trace of mixed requests, and what it took."""

from omnifp4.benchmark.server.load import bench_server
from omnifp4.benchmark.server.text import server_load_text
from omnifp4.benchmark.server.trace import Arrivals, Kind, TraceOptions, parse_mix

__all__ = ["Arrivals", "Kind", "TraceOptions", "bench_server", "parse_mix", "server_load_text"]
