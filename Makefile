# Everything a person or CI runs. `make demo` and `make test` need nothing but Debian and root.
PYTHON ?= python3
BIN := .venv/bin
PACKAGES := python3 python3-venv serf wireguard-go nftables iptables docker.io iproute2 util-linux \
	busybox-static wireguard-tools tcpdump systemd-container bsdutils procps dbus-daemon python3-dbus python3-gi

# What the guest with Debian's kernel needs; only `make test-kernel` asks for it.
GUEST := qemu-system-x86 kmod busybox-static

# What a host of a mesh needs; Docker is the host's own choice.
RUNTIME := python3 python3-venv serf nftables iptables
PREFIX ?= /opt/meshd
WORKERS ?= 2
DOCKERS ?= trixie sid

# Python may be upgraded under a virtual environment, which then has no pip, or not even a python: it is made anew. What is
# no virtual environment is left alone: --clear removes whatever is there.
define venv
$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $$(test ! -e $(1)/pyvenv.cfg || echo --clear) $(1)
endef

# What the benchmarks compare with and measure by, unpacked and not installed: iperf3, tinc and Nebula bring services.
TOOLS := iperf3 libiperf0 libsctp1 iputils-ping tinc liblzo2-2 nebula
# The suites with a newer wireguard-go.
NEWER := trixie sid

.PHONY: install uninstall setup demo demo-down test test-long test-docker test-kernel chaos bench bench-quick bench-scale bench-compare test-unit fuzz check format clean

setup: .make/packages .make/wheel

# dpkg first: a machine that has everything needs no network. Newer Debians split the client off docker.io.
.make/packages: Makefile
	@mkdir -p .make
	dpkg -s $(PACKAGES) >/dev/null 2>&1 || .ci/install-packages $(PACKAGES)
	@touch $@

.make/venv: pyproject.toml
	@mkdir -p .make
	$(call venv,.venv)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --group dev --group bench
	@touch $@

# What runs is the built wheel, in the demo as in the tests: a file that the wheel lacks is found here.
.make/wheel: .make/venv $(shell find meshd handlers images -type f -not -name '*.pyc') README.md
	rm -rf dist && $(BIN)/python -m build --wheel --no-isolation --outdir dist . >/dev/null
	$(BIN)/python -m pip uninstall --quiet --yes meshd
	$(BIN)/python -m pip install --quiet dist/*.whl
	@touch $@

install:
	dpkg -s $(RUNTIME) >/dev/null 2>&1 || .ci/install-packages $(RUNTIME)
	$(call venv,$(PREFIX))
	$(PREFIX)/bin/python -m pip install --quiet --upgrade .
	ln -sfn $(PREFIX)/bin/meshd /usr/local/bin/meshd

uninstall:
	rm -rf $(PREFIX)
	rm -f /usr/local/bin/meshd

demo: setup
	$(BIN)/meshd lab demo

demo-down: setup
	$(BIN)/meshd lab down

# Most tests wait most of the time, so two files run at once, in the order of tests/conftest.py. They are copied away from the
# sources, so that they import the installed wheel and not the checkout.
test: setup .make/busybox .make/firewalls
	rm -rf .make/tests && mkdir -p .make/tests && cp -r tests pyproject.toml .make/tests/
	cd .make/tests && MESHD_BUSYBOX=$(CURDIR)/.make/busybox MESHD_FIREWALLS=$(CURDIR)/.make/firewalls \
		../../$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		--ignore=tests/lab/test_dockers.py $(PYTEST)

# The root of hosts that have little else than busybox.
.make/busybox: .ci/fetch-busybox
	.ci/fetch-busybox $@

.make/firewalls: .ci/fetch-firewalls
	.ci/fetch-firewalls $@

# The same attacks for longer, and more that is drawn at random: half an hour.
LONG := attacks_bounds attacks_memory attacks_serf handshakes same_name
test-long: setup
	rm -rf .make/tests && mkdir -p .make/tests && cp -r tests pyproject.toml .make/tests/
	cd .make/tests && MESHD_LONG=1 ../../$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
		$(LONG:%=tests/lab/test_%.py) $(PYTEST)

# Docker's versions of Debian's other suites, unpacked beside the machine's own.
test-docker: setup $(DOCKERS:%=.make/docker/%)
	rm -rf .make/tests && mkdir -p .make/tests && cp -r tests pyproject.toml .make/tests/
	cd .make/tests && MESHD_DOCKERS=$(CURDIR)/.make/docker ../../$(BIN)/python -m pytest \
		tests/lab/test_dockers.py $(PYTEST)

# runc stays the machine's: the newer ones want a newer libc, and it has no part in the network.
.make/docker/%: .ci/unpack
	.ci/unpack $* $@ docker.io containerd

# Random faults and a check of everything after each: `make chaos CHAOS=50 CHAOS_SEED=7`.
CHAOS ?= 200
chaos: setup
	rm -rf .make/chaos && mkdir -p .make/chaos && cp -r tests .make/chaos/
	cd .make/chaos && ../../$(BIN)/python -m tests.chaos --faults $(CHAOS) $(addprefix --seed ,$(CHAOS_SEED))

# The kernel's own WireGuard, and netem, in a guest with Debian's kernel: what the machine itself may lack.
test-kernel: setup .make/kernel
	rm -rf .make/tests && mkdir -p .make/tests && cp -r tests pyproject.toml .make/tests/
	tests/kernel/guest . -m kernel -n 2 --dist loadfile tests/netns/test_wireguard.py tests/kernel $(PYTEST)

.make/kernel: tests/kernel/fetch
	dpkg -s $(GUEST) >/dev/null 2>&1 || .ci/install-packages $(GUEST)
	tests/kernel/fetch $@

# Figures, not tests: tables here, JSON and plots in docs/benchmarks. `make bench BENCH=passes` for one of them.
BENCH ?=
bench: setup .make/tools/own $(NEWER:%=.make/tools/%)
	$(BIN)/python -m tests.bench $(BENCH)

bench-quick: setup .make/tools/own $(NEWER:%=.make/tools/%)
	$(BIN)/python -m tests.bench --quick --out .make/bench $(BENCH)

# A mesh that grows to a hundred hosts on this machine; docs/scale.md says what follows.
bench-scale: setup
	$(BIN)/python -m tests.bench scale

# A commit and a newer one, in turn in one run, with nothing else on the machine: `make bench-compare REV=v1.0`. HEAD is the
# newer one unless AGAINST names another; BENCH=passes, handler, joins or at-rest for one measurement.
AGAINST ?= HEAD
bench-compare: setup
	@test -n "$(REV)" || { echo 'Which commit? make bench-compare REV=<commit>' >&2; exit 2; }
	$(BIN)/python -m tests.bench.compare --against $(AGAINST) $(REV) $(BENCH)

.make/tools/own: .ci/unpack
	.ci/unpack $$(. /etc/os-release && echo $$VERSION_CODENAME) $@ $(TOOLS)

.make/tools/%: .ci/unpack
	.ci/unpack $* $@ wireguard-go

# On the checkout, in a venv of their own where it is installed in place: no wheel is built after a change, and neither root
# nor Debian is needed. `make test` runs them again on the built wheel, with the few that this leaves out.
test-unit: .make/unit
	.make/unit/bin/python -m pytest -n $(WORKERS) -m "not root and not debian" tests/unit $(PYTEST)

.make/unit: pyproject.toml
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$@/bin/python -m pip install --quiet --group dev --editable .
	@touch $@

# Every property test for long, about half an hour; in short they are part of `make test`.
fuzz: setup
	$(BIN)/python -m pytest tests/unit --hypothesis-profile=fuzz $(PYTEST)

check: .make/venv
	$(BIN)/ruff check && $(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .make/venv
	$(BIN)/ruff check --fix && $(BIN)/ruff format

clean:
	rm -rf .make .venv dist
