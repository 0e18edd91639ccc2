# caskd: `make demo` runs the main job on a real teacher, `make test` runs every test.
# Both fetch what they need (libtorch, the teacher) into the user's cache folder, once.

.PHONY: help demo test build lint bench doc tools libtorch teacher clean

help:
	@echo 'make demo    fetch libtorch and a real teacher, build, run the main job (about 10 minutes on 2 cores)'
	@echo 'make test    every test'
	@echo 'make build   target/release/caskd'
	@echo 'make lint    rustfmt and clippy, warnings are errors'
	@echo 'make bench   the benchmarks, as ratios against a rival in the same run'
	@echo 'make doc     the API documentation, warnings are errors'

demo: build teacher
	target/release/caskd demo --teacher "$$(scripts/fetch.sh teacher)"

build: libtorch
	cargo build --release --locked

test: libtorch teacher
	CASKD_TEACHER="$$(scripts/fetch.sh teacher)" scripts/test.sh

lint: libtorch
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets --locked -- -D warnings

bench: build teacher
	CASKD_TEACHER="$$(scripts/fetch.sh teacher)" runs/bench.sh

doc: libtorch
	RUSTDOCFLAGS='-D warnings' cargo doc --release --workspace --no-deps --locked

tools:
	@scripts/tools.sh

libtorch: tools
	@scripts/fetch.sh libtorch

teacher: tools
	@scripts/fetch.sh teacher >/dev/null

clean:
	cargo clean
