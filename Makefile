# flyrun's build. `make help` lists what there is.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:

PREFIX ?= /usr/local
TIME ?= 600
ROUNDS ?= 300
CASES ?= 100000
CYCLES ?= 100
CLONES ?= 200
MINUTES ?= 20
TARGET := x86_64-unknown-linux-gnu
DIST := target/dist
LIB := $(DIST)/lib/flyrun
HOST := tests/host/run
# All programs are static: they start without a dynamic linker, and in guests there is none. cargo keeps them apart by --target.
# What a guest's bytes reach is loaded at an address of its own each time; `flyrun` and its monitor, which are safe Rust and start for
# each machine, are not, as Go's programs are not: to relocate them takes 0.8 ms of virtual time a start. They are built in a directory
# of their own, since cargo builds anew what it finds built with other flags.
FIXED := target/fixed
# Where they were built is not in them: the same commit gives the same bytes anywhere (`make reproduce`).
CARGO_DIR := $(or $(CARGO_HOME),$(HOME)/.cargo)
STATIC := -C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs --remap-path-prefix=$(CURDIR)=/flyrun --remap-path-prefix=$(CARGO_DIR)=/cargo
# The functions that a start runs lie together in all three programs; `benches/order` makes the list anew.
START_ORDER := FLYRUN_START_ORDER=$(CURDIR)/benches/start.order
BUILD := $(START_ORDER) CFLAGS="-ffile-prefix-map=$(CURDIR)=/flyrun -ffile-prefix-map=$(CARGO_DIR)=/cargo" cargo build --locked --release --target $(TARGET)

.PHONY: help demo build kernel programs test unit e2e bench soak fuzz sbom reproduce install fmt lint images attacker clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

demo: build ## Run an image made of Debian's packages in a virtual machine
	@images=$$(tests/images/build)
	$(HOST) --timeout 600 -- sh -c "
	    set -e
	    export PATH=$(CURDIR)/$(DIST)/bin:\$$PATH
	    set -x
	    flyrun run --rm oci:$$images/oci/busybox sh -c 'echo Hello from inside a virtual machine; uname -a'
	    flyrun run --rm oci:$$images/oci/python python3 hello.py in a microVM
	    flyrun images"

build: programs kernel ## Build everything into target/dist

programs:
	@tests/setup
	RUSTFLAGS="$(STATIC)" $(BUILD) -p vmm -p guest-init --bins
	RUSTFLAGS="$(STATIC) -C relocation-model=static" $(BUILD) --target-dir $(FIXED) -p flyrun --bins
	mkdir -p $(DIST)/bin $(LIB)
	keep() { cmp -s "$$1" "$$2" || install "$$1" "$$2"; }
	keep $(FIXED)/$(TARGET)/release/flyrun $(DIST)/bin/flyrun
	keep $(FIXED)/$(TARGET)/release/flyrun-monitor $(LIB)/flyrun-monitor
	keep target/$(TARGET)/release/flyrun-vmm $(LIB)/flyrun-vmm
	tests/initramfs target/$(TARGET)/release/guest-init $(LIB)/initramfs-run.cpio
	tests/initramfs target/$(TARGET)/release/guest-unpack $(LIB)/initramfs-unpack.cpio

kernel:
	@mkdir -p $(LIB)
	keep() { cmp -s "$$1" "$$2" || install -m 644 "$$1" "$$2"; }
	path=$$(images/kernel/build)
	keep "$$path" $(LIB)/vmlinux
	path=$$(images/kernel/build --smp)
	keep "$$path" $(LIB)/vmlinux-smp

test: unit e2e ## Run all tests: unit tests here, end-to-end tests in the test host

unit:
	@tests/setup
	if command -v cargo-nextest > /dev/null; then
	    cargo nextest run --workspace --exclude tests --exclude benches --no-fail-fast --no-tests=pass
	else
	    cargo test --workspace --exclude tests --exclude benches --no-fail-fast
	fi

# Two test hosts of one processor each, side by side: QEMU 7.2 now and then runs a stale translation of code that a
# guest's kernel has patched when it emulates several processors at once (a triple fault in about 1 of 50 boots).
# NAME=part-of-a-name runs some tests, in one.
# About half of the tests, by parts of their names.
FIRST_HOST := run_ network exec:: suspend registries iperf3 deploy lease
E2E := cargo test -p tests --test e2e -- --test-threads=2
e2e: build images attacker
	@mkdir -p target/e2e
	export FLYRUN_TEST_IMAGES=$$(tests/images/build) FLYRUN_BIN=$(CURDIR)/$(DIST)/bin/flyrun
	export RUST_BACKTRACE=0 FLYRUN_REQUIRE_KVM=1
	export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$(CURDIR)/$(HOST) --cpus 1 --share $(CURDIR)/target/e2e --timeout 3600 --"
	if [[ -n "$(NAME)" ]]; then
	    $(E2E) $(NAME)
	    exit
	fi
	cargo test -p tests -p vmm --test e2e --test boot --test snapshot --no-run
	$(E2E) $(FIRST_HOST) > target/e2e/first.log 2>&1 &
	first=$$! failed=0
	$(E2E) $(addprefix --skip ,$(FIRST_HOST)) || failed=1
	wait $$first || failed=1
	cat target/e2e/first.log
	cargo test -p vmm --test boot --test snapshot -- --test-threads=2 || failed=1
	exit $$failed

images:
	@tests/images/build > /dev/null

# The kernel of the hostile-guest suite.
attacker:
	@tests/attacker/build > /dev/null

bench: build ## Measure in virtual time, and write target/bench.json
	@cargo build --release -p benches
	benches/run --dist $(DIST)

# Not part of `make test`: 300 rounds take about 20 minutes in the test host, 100 cycles some 40. NAME=part-of-a-name runs some.
soak: build images attacker ## Kill processes ROUNDS times (300), suspend services CYCLES times (100), make CLONES clones (200), serve and be attacked for MINUTES (20)
	@export FLYRUN_TEST_IMAGES=$$(tests/images/build) FLYRUN_BIN=$(CURDIR)/$(DIST)/bin/flyrun FLYRUN_SOAK_ROUNDS=$(ROUNDS)
	export FLYRUN_SOAK_CYCLES=$(CYCLES) FLYRUN_SOAK_CLONES=$(CLONES) FLYRUN_SOAK_MINUTES=$(MINUTES)
	export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$(CURDIR)/$(HOST) --cpus 1 --memory 10240 --timeout 14400 --"
	if [[ -z "$(NAME)" ]]; then
	    FLYRUN_CORRUPTION_KVM_CASES=500 FLYRUN_REQUIRE_KVM=1 cargo test -p vmm --test snapshot -- --nocapture kvm_is
	fi
	cargo test -p tests --test soak -- --nocapture --test-threads=1 $(NAME)

# TOTAL=seconds bounds all targets together; NAME=part-of-crate/target runs some.
fuzz: ## Fuzz each parser of foreign bytes for TIME seconds (default 600), or all in TOTAL, and read CASES corrupted snapshots (default 100000)
	@[[ -n "$(NAME)" ]] || FLYRUN_CORRUPTION_CASES=$(CASES) cargo test --release -p vmm --test corruption -- --nocapture
	tests/fuzz $(addprefix --only ,$(NAME)) $(if $(TOTAL),--total $(TOTAL),$(TIME))

sbom: ## Write what the programs are made of to target/sbom, as CycloneDX JSON
	@tests/supply/sbom

# Some 20 minutes: two builds from nothing.
reproduce: ## Build the last commit in two places, and compare the programs byte by byte
	@tests/supply/reproduce

install: build ## Install below PREFIX (default /usr/local; DESTDIR is honoured)
	@install -D $(DIST)/bin/flyrun $(DESTDIR)$(PREFIX)/bin/flyrun
	install -d $(DESTDIR)$(PREFIX)/lib/flyrun
	install $(LIB)/flyrun-{vmm,monitor} $(DESTDIR)$(PREFIX)/lib/flyrun/
	install -m 644 $(LIB)/vmlinux* $(LIB)/initramfs-*.cpio $(DESTDIR)$(PREFIX)/lib/flyrun/
	$(DIST)/bin/flyrun man $(DESTDIR)$(PREFIX)/share/man/man1
	mkdir -p $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	$(DIST)/bin/flyrun completions bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/flyrun
	echo "installed below $(DESTDIR)$(PREFIX); see what your machine lacks: flyrun doctor"

fmt: ## Format the code
	@cargo fmt --all

lint: ## Check format, lints, shell scripts, licences, duplicates and the table of dependencies
	@tests/setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	tests/attacker/build clippy -- -D warnings > /dev/null
	shellcheck -x tests/attacker/build tests/e2e/{one_liners,bad_input,try}.sh tests/host/{run,prepare,stage2} tests/images/build tests/setup tests/initramfs tests/fuzz tests/deny tests/supply/{sbom,reproduce} .ci/run images/kernel/build benches/run
	shellcheck -s sh tests/host/init benches/guest/io
	tests/deny
	tests/supply/dependencies

clean: ## Remove what was built here (caches in ~/.cache/flyrun stay)
	@rm -rf target
