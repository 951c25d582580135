#!/usr/bin/env bash
# Prints where Chromium is; installs Debian's package first where there is none and this may be done. Status 1: there is none.
set -euo pipefail
find_it() { command -v "${CHROMIUM:-chromium}" || command -v chromium-browser || command -v google-chrome; }
if find_it; then exit; fi
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } >&2 || true
fi
find_it
