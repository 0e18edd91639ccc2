#!/usr/bin/env bash
# Opens a report in headless Chromium, without a network: no console message, drawn in light and dark, wide and
# narrow, and as wide as its window (only tables and drawings scroll).
# Usage: tests/report_page.sh report.html [folder for the screenshots]
set -euo pipefail
page=$(realpath "$1")
shots=${2:-$(mktemp -d)}
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)
if [ -z "$browser" ]; then
    echo "SKIPPED: there is no Chromium" >&2
    exit 0
fi
mkdir -p "$shots"
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
open() {
    "$browser" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --no-first-run \
        --user-data-dir="$profile" --host-resolver-rules='MAP * ~NOTFOUND' --enable-logging=stderr --v=0 "$@"
}
# The page reports on itself through its title: what is wider than the window, and what the keyboard can't reach.
probe=$profile/probe.html
sed 's#</body>#<script>addEventListener("load", () => { const root = document.documentElement; const unreachable = [...document.querySelectorAll(".scroll, summary")].filter(e => e.tabIndex < 0); document.querySelectorAll("details").forEach(d => d.open = true); root.dataset.probe = `over ${root.scrollWidth - innerWidth} unreachable ${unreachable.length} sections ${document.querySelectorAll("section").length}`; });</script></body>#' "$page" >"$probe"
for size in 1400,2600 400,3600; do
    for scheme in 0 1; do # 0 is dark, 1 light
        name=$shots/${size%,*}-$([ $scheme = 0 ] && echo dark || echo light)
        open --window-size=$size --blink-settings=preferredColorScheme=$scheme --screenshot="$name.png" "file://$page" 2>"$name.log"
        if grep 'CONSOLE' "$name.log"; then
            echo "the page writes to the console" >&2
            exit 1
        fi
        [ -s "$name.png" ] || { echo "nothing was drawn" >&2; exit 1; }
    done
    found=$(open --window-size=$size --dump-dom "file://$probe" 2>/dev/null | grep -o 'data-probe="[^"]*"')
    echo "${size%,*}: $found"
    case $found in
    *'over 0 unreachable 0'* | *'over -'*'unreachable 0'*) ;;
    *)
        echo "wider than the window, or out of the keyboard's reach" >&2
        exit 1
        ;;
    esac
done
echo "screenshots in $shots"
