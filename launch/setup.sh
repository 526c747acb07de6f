#!/usr/bin/env bash
# Makes the virtual environment $1 (default .venv) from requirements.txt; does nothing
# when it is up to date, so everything after the first call works offline.
# PYTHON=... picks the interpreter; otherwise the first of python3.12, 3.11, 3.13,
# python3 that runs and is 3.11 or newer.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}

stop() { printf 'setup: %s\n' "$1" >&2; exit 2; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

stamp=$(cat requirements.txt setup.py launch/setup.sh | git hash-object --stdin 2>/dev/null) \
  || stop "git is missing: install it with your system's package manager"
if [ -n "${PYTHON:-}" ]; then
  new_enough "$PYTHON" || stop "PYTHON=$PYTHON does not run or is older than 3.11"
  stamp="$stamp $("$PYTHON" -c 'import sys; print(sys.version.split()[0])')"
  case "$(cat "$venv/.installed" 2>/dev/null)" in "$stamp"*) exit 0 ;; esac
fi
case "$(cat "$venv/.installed" 2>/dev/null)" in "$stamp"*) exit 0 ;; esac

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.12 python3.11 python3.13 python3; do
    if new_enough "$candidate"; then python=$candidate; break; fi
  done
  [ -n "$python" ] || stop "no Python >= 3.11 found; install one or set PYTHON=/path/to/python"
fi
"$python" -c 'import venv, ensurepip' 2>/dev/null || command -v uv >/dev/null \
  || stop "$python has no venv module: install it (Debian: apt-get install python3-venv) or uv"

# Not an interpreter of the environment itself, which is made anew.
python=$("$python" -c 'import sys; print(sys._base_executable)')
version=$("$python" -c 'import sys; print(sys.version.split()[0])')
old=$(cat "$venv/.installed" 2>/dev/null || true)
if [ -n "$old" ] && [ "${old##* }" != "$version" ]; then
  echo "setup: $venv has Python ${old##* } and is replaced; VENV=.venv-$version keeps both"
fi
echo "setup: installing into $venv with Python $version (about a minute)"
rm -rf "$venv"
offline="the packages could not be fetched: is there a network and a package index?"
if command -v uv >/dev/null; then
  uv venv --quiet --seed --python "$python" "$venv"
  uv pip install --quiet --python "$venv" --require-hashes -r requirements.txt || stop "$offline"
  uv pip install --quiet --python "$venv" --no-deps -e . || stop "$offline"
else
  "$python" -m venv "$venv"
  "$venv/bin/pip" install --quiet --require-hashes -r requirements.txt || stop "$offline"
  "$venv/bin/pip" install --quiet --no-deps -e . || stop "$offline"
fi
printf '%s %s' "${stamp%% *}" "$version" > "$venv/.installed"
