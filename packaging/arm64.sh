#!/bin/sh
# Compiles deformkit for Linux on 64-bit Arm and runs Python with it on an emulated processor. Arguments are Python's:
#   packaging/arm64.sh -m deformkit doctor
#   packaging/arm64.sh -m pytest -o addopts=--import-mode=importlib tests/ops/test_product.py
# It needs Debian with the packages qemu-user-static and g++-aarch64-linux-gnu, and the environment of `make test`. What
# it fetches (200 MB) and builds lies in build/arm64. Emulation shows results, not speed.
set -eu
cd "$(dirname "$0")/.."
folder=$PWD/build/arm64 venv=$PWD/.venv/bin
mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial" "$folder/package"

# Debian's Python for Arm with all that it needs, unpacked and not installed.
apt() {
  apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Debug::NoLocking=1 -o APT::Sandbox::User= \
    -o Dir::State::Lists="$folder/lists" -o Dir::Cache="$folder/cache" -o Dir::State::Status=/dev/null "$@"
}
if ! [ -e "$folder/.system" ]; then
  apt update
  apt install --download-only --yes --no-install-recommends python3 libgomp1 libstdc++6
  for package in "$folder"/cache/archives/*.deb; do dpkg-deb --extract "$package" "$folder/system"; done
  touch "$folder/.system"
fi
python=$(basename "$(readlink -f "$folder/system/usr/bin/python3")")

# torch 2.10 is the last whose wheel for Arm does without CUDA. What it requires is named here, since pip would look up
# what it requires on this processor.
fetch() {
  "$venv/python" -m pip install --quiet --target "$folder/packages" --python-version "${python#python}" \
    --only-binary=:all: --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux_2_17_aarch64 "$@"
}
if ! [ -e "$folder/.packages" ]; then
  fetch --no-deps torch==2.10.0
  fetch filelock fsspec jinja2 networkx sympy typing_extensions numpy pytest hypothesis typer rich
  touch "$folder/.packages"
fi

"$venv/cmake" -S . -B "$folder/build" -G Ninja -DCMAKE_MAKE_PROGRAM="$venv/ninja" -DPython_EXECUTABLE="$venv/python" \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DDEFORMKIT_TORCH="$folder/packages/torch" >"$folder/cmake.log"
"$venv/cmake" --build "$folder/build"

# The package as it would be installed: its Python files beside these libraries.
rm -rf "$folder/package/deformkit"
cp -r src/deformkit "$folder/package/deformkit"
rm -rf "$folder/package/deformkit/lib"
mkdir "$folder/package/deformkit/lib"
cp "$folder"/build/*.so "$folder/package/deformkit/lib"

# Python starts others like itself under the name of this file, which is emulated then, too. Tests that compile C++ need
# the compiler for Arm.
cat >"$folder/python" <<END
#!/bin/sh
export PYTHONHOME=$folder/system/usr PYTHONPATH=$folder/package:$folder/packages\${PYTHONPATH:+:\$PYTHONPATH}
export CXX=aarch64-linux-gnu-g++ PYTHONDONTWRITEBYTECODE=1
exec qemu-aarch64-static -0 $folder/python -L $folder/system $folder/system/usr/bin/$python "\$@"
END
chmod +x "$folder/python"
exec "$folder/python" "$@"
