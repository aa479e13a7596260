# Commands for developers. `make demo` and `make test` require Debian 12, the Rust toolchain and
# root.

PREFIX ?= /usr/local
TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
# The images are built once and shared by the demo, the tests and the benchmarks.
export WRENN_IMAGES_DIR ?= $(TARGET)/wrenn-images
# Guest agent that is installed in the images.
GUEST := $(TARGET)/x86_64-unknown-linux-gnu/guest
ENVD := $(GUEST)/envd

.PHONY: help demo test test-firecracker build dev image setup setup-test envd bench bench-envd bench-pager bench-micro soak openapi fuzz lint clean install

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## Install, start the service, run code in a sandbox, check its isolation, clean up
	@scripts/demo

test: setup-test dev image ## Run all tests, including those in real VMs
	WRENN_BIN="$(TARGET)/debug/wrenn" WRENN_ENVD="$(ENVD)" cargo nextest run --locked --workspace $(NEXTEST)
	cargo test --locked --workspace --doc -q

test-firecracker: ## Run the scenarios of Firecracker, and of QEMU with KVM
	@WRENN_BIN="$(TARGET)/debug/wrenn" WRENN_ENVD="$(ENVD)" scripts/test-firecracker $(NEXTEST)

build: envd ## Build the release files in dist/
	cargo build --locked --release -p wrenn-cli -p wrenn-preload
	install -D -C -m 755 "$(TARGET)/release/wrenn" dist/wrenn
	install -D -C -m 755 "$(TARGET)/release/libwrenn_preload.so" dist/libwrenn_preload.so
	install -D -C -m 755 "$(ENVD)" dist/envd
	install -D -C -m 755 "$(GUEST)/wrenn-init" dist/wrenn-init

setup: ## Install the OS packages that Wrenn requires
	@scripts/setup

image: dev ## Build the templates in WRENN_IMAGES_DIR
	"$(TARGET)/debug/wrenn" image build --envd "$(ENVD)"

bench: setup-test build ## Run the benchmarks; JSON on standard output
	dist/wrenn image build >&2
	cargo build --locked --release -p wrenn-e2e --bin bench
	WRENN_BIN="$(CURDIR)/dist/wrenn" WRENN_ENVD="$(CURDIR)/dist/envd" "$(TARGET)/release/bench" $(BENCH)

bench-envd: setup envd ## Compare the guest agent on this host with direct execution
	cargo run --locked --release -q -p wrenn-envd --example bench -- "$(ENVD)"

bench-pager: ## Compare the page server with a minimal one
	cargo run --locked --release -q -p wrenn-pager --example faults

bench-micro: ## Run the micro benchmarks of benches/
	cargo bench --locked -q -p wrenn-benches

soak: setup-test dev image ## Run the end-to-end tests with all rounds, and the upgrade from 0.1.0
	scripts/build-release-0.1.0 "$(TARGET)/release-0.1.0"
	WRENN_SOAK=1 WRENN_BIN="$(TARGET)/debug/wrenn" WRENN_ENVD="$(ENVD)" \
		WRENN_RELEASE_0_1_0="$(TARGET)/release-0.1.0" \
		cargo nextest run --locked --profile soak -p wrenn-e2e $(NEXTEST)

openapi: ## Write openapi/v1.yaml, the committed REST API document
	WRENN_WRITE_OPENAPI=1 cargo nextest run --locked --workspace --test api \
		-E 'test(served_document_is_the_committed_one)'

fuzz: ## Run each fuzz target for SECONDS (default 30)
	@scripts/fuzz $(or $(SECONDS),30)

lint: ## Check format, clippy and documentation
	cargo fmt --all --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items

install: build ## Install in PREFIX (default /usr/local)
	install -D -m 755 dist/wrenn "$(DESTDIR)$(PREFIX)/bin/wrenn"
	install -D -m 755 dist/libwrenn_preload.so "$(DESTDIR)$(PREFIX)/lib/wrenn/libwrenn_preload.so"
	install -D -m 755 dist/envd "$(DESTDIR)$(PREFIX)/lib/wrenn/envd"
	install -D -m 755 dist/wrenn-init "$(DESTDIR)$(PREFIX)/lib/wrenn/wrenn-init"

clean: ## Remove all build results, including images
	rm -rf dist "$(TARGET)/demo" "$(WRENN_IMAGES_DIR)"
	cargo clean

setup-test:
	@scripts/setup --test

envd:
	@scripts/envd

# Builds the tested programs and the tests with the development profile, which has overflow checks
# and assertions. In one call: dependencies have more features with the tests than without them, and
# would be built twice.
dev: setup envd
	cargo build --locked --workspace --lib --bins --tests
