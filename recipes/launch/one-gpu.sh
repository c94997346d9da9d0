#!/bin/sh
# One card: sh recipes/launch/one-gpu.sh RECIPE [key=value ...]. The same command goes on.
set -eu
exec promptkd train "$@"
