# What there is to run; the first lines of each are in CONTRIBUTING.md.
#
#   make                 build bin/sproutd, bin/sproutctl and bin/sprout-initrd
#   sudo make demo       the whole story on loop and zram devices of its own
#   sudo make test       lint, vet, and all tests with the race detector, as root
#   sudo make check      all that CI runs: test and test-vm
#   make test-unit       the tests that need no root
#   make lint format     golangci-lint and shellcheck; gofmt and its friends
#   sudo make bench      compare with other tools and the bare kernel, measure the daemon
#   sudo make live-image a stick that boots: .cache/live/stick.img
#   make vm              boot it in a virtual machine, in this terminal
#   sudo make test-vm    the stories of a stick and a disk, in a virtual machine
#                        (also test-vm-cuts: many power cuts; test-vm-matrix:
#                        other kernels; bench-vm: the time to the root)
#   sudo make install    with DESTDIR= and PREFIX=; uninstall takes it back
#
# `test`, `demo`, `bench` and, as root, `live-image` install the programs they
# need (tests/setup.sh).

.DELETE_ON_ERROR:
.DEFAULT_GOAL := all
SHELL := /bin/bash

# sudo leaves out the user's PATH and, on some systems, keeps the user's HOME.
# Go is then looked for where people put it, and root's caches stay root's own.
ROOT := $(filter 0,$(shell id -u))
SUDO_HOME := $(if $(SUDO_USER),$(shell getent passwd $(SUDO_USER) | cut -d: -f6))
ifneq ($(and $(ROOT),$(SUDO_USER)),)
export HOME := $(shell getent passwd 0 | cut -d: -f6)
endif
GO ?= $(or $(shell command -v go),$(firstword $(wildcard \
	/usr/local/go/bin/go /usr/lib/go/bin/go /usr/lib/golang/bin/go /usr/lib/go-*/bin/go /snap/bin/go \
	$(SUDO_HOME)/go/bin/go $(SUDO_HOME)/.local/go/bin/go $(SUDO_HOME)/sdk/go*/bin/go)),go)
export PATH := $(CURDIR)/bin:$(if $(findstring /,$(GO)),$(dir $(GO)):)$(PATH):/usr/sbin:/sbin

# git refuses a checkout of another user, which is what root sees under sudo.
VERSION ?= $(or $(shell git -c safe.directory='$(CURDIR)' describe --tags --always --dirty 2>/dev/null),dev)
export GOFLAGS += -buildvcs=false

GOLANGCI_VERSION := v2.12.0
GOLANGCI ?= .cache/bin/golangci-lint-$(GOLANGCI_VERSION)
# Each checkout has its own: findings are kept with absolute paths, and those of
# a clone that is gone come back without the lines that excuse them.
export GOLANGCI_LINT_CACHE := $(CURDIR)/.cache/golangci-lint
SCRIPTS = $(wildcard .ci/run data/*-generator.in data/initramfs-tools/*/* data/dracut/*/* live/*.sh tests/*.sh)
PACKAGES ?= ./...
# For each package; the packages run one after the other.
TEST_TIMEOUT ?= 25m

# dbus-daemon and polkit read policies below /usr only, so PREFIX=/usr/local
# needs DESTDIR or a policy by hand.
PREFIX ?= /usr
BINDIR ?= $(PREFIX)/bin
LIBEXECDIR ?= $(PREFIX)/libexec
DATADIR ?= $(PREFIX)/share
UNITDIR ?= $(PREFIX)/lib/systemd/system
UDEVDIR ?= $(PREFIX)/lib/udev/rules.d
DRACUTDIR ?= $(PREFIX)/lib/dracut/modules.d
INITRAMFSDIR ?= $(DATADIR)/initramfs-tools
GENERATORDIR ?= $(PREFIX)/lib/systemd/system-generators
MANDIR ?= $(DATADIR)/man

.PHONY: all build live-image vm need-root setup lint format vet test check test-unit test-root test-vm test-vm-cuts test-vm-matrix bench bench-vm demo install uninstall clean

all: build

# Root leaves nothing in a user's checkout that the user cannot replace.
GIVE_BACK = [ -z '$(ROOT)' ] || find . -xdev -path ./.git -prune -o -uid 0 -exec chown -h --reference=. {} +

build:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-X main.version=$(VERSION)' -o bin/ ./cmd/sproutd ./cmd/sproutctl
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/ ./cmd/sprout-initrd
	@$(GIVE_BACK)

need-root:
	@[ -n '$(ROOT)' ] || { echo 'this works on real block devices: run `sudo make $(firstword $(MAKECMDGOALS))`' >&2; exit 1; }

setup:
	@tests/setup.sh $(if $(filter bench,$(MAKECMDGOALS)),bench)

.cache/bin/golangci-lint-$(GOLANGCI_VERSION):
	GOBIN='$(CURDIR)/.cache/bin' $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_VERSION)
	mv .cache/bin/golangci-lint $@
	@$(GIVE_BACK)

lint: $(GOLANGCI)
	$(GOLANGCI) run $(PACKAGES)
	shellcheck $(SCRIPTS)

format: $(GOLANGCI)
	$(GOLANGCI) fmt

vet:
	$(GO) vet $(PACKAGES)

# Root tests are skipped, each with its reason, when this runs without root.
test-unit:
	$(GO) test -race $(PACKAGES)

# One package at a time, since a loaded machine makes storage tests slow and
# their logs hard to read. The compiler may use all processors before that.
# No result is taken from the cache (-count=1): it does not know of the programs
# that tests build, nor of the kernel.
test-root: need-root
	$(GO) build -race $(PACKAGES)
	@status=0; SPROUTD_TEST_ROOT=1 tests/leftovers.sh \
		$(GO) test -race -count=1 -p 1 -timeout $(TEST_TIMEOUT) $(PACKAGES) || status=$$?; $(GIVE_BACK); exit $$status

# As root the root tests are the unit tests as well: no test runs twice.
test: need-root setup
	@$(MAKE) --no-print-directory lint vet
	@$(MAKE) --no-print-directory test-root

check: need-root
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory test-vm

# Not with `go run`, which would die of a signal before the program has tidied up.
bench demo: need-root setup build
	CGO_ENABLED=0 $(GO) build -trimpath -o .cache/bin/ ./tests/$@
	@status=0; tests/leftovers.sh .cache/bin/$@ $(FLAGS) || status=$$?; $(GIVE_BACK); exit $$status

# With SUITE=, INITRAMFS=, OVERLAY= and more, which live/build.sh explains.
live-image: build
	@tests/setup.sh vm
	@status=0; live/build.sh || status=$$?; $(GIVE_BACK); exit $$status

vm:
	@[ -z '$(ROOT)' ] || tests/setup.sh vm
	@live/run.sh

# The tests have a stick of their own: with an agent in it that they talk to.
# RUN= is a pattern of the tests to run.
VM_DIR = .cache/vm$(VM_KIND)
RUN ?= .

define VM_OVERLAY
	rm -rf $(VM_DIR)/overlay
	mkdir -p $(VM_DIR)/overlay
	cp -r tests/vm/agent/root/. $(VM_DIR)/overlay
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $(VM_DIR)/overlay/usr/local/sbin/sprout-test-agent ./tests/vm/agent
	@$(MAKE) --no-print-directory live-image OVERLAY='$(CURDIR)/$(VM_DIR)/overlay' OUT='$(CURDIR)/$(VM_DIR)/stick.img'
endef

VM_ENV = SPROUTD_TEST_VM=1 SPROUTD_VM_IMAGE='$(CURDIR)/$(VM_DIR)/stick.img' SPROUTD_VM_ARTEFACTS='$(CURDIR)/$(VM_DIR)'

define VM_TEST
	$(VM_OVERLAY)
	@set -o pipefail; status=0; $(VM_ENV) $(GO) test -v -count=1 -timeout 8h -run '$(RUN)' ./tests/vm | \
		tee $(VM_DIR)/test.log || status=$$?; $(GIVE_BACK); exit $$status
endef

test-vm: build
	$(VM_TEST)

# The results go to $(VM_DIR)/cuts.md.
test-vm-cuts: export SPROUTD_VM_CUTS ?= 24
test-vm-cuts: export SPROUTD_VM_REPLAYS ?= 24
test-vm-cuts: RUN = PowerCuts|WritesThatWereFlushed
test-vm-cuts: build
	$(VM_TEST)

# The oldest kernel that is supported and the newest; what is in `test-vm` is
# between them.
test-vm-matrix:
	@$(MAKE) --no-print-directory test-vm VM_KIND=-bookworm SUITE=bookworm
	@$(MAKE) --no-print-directory test-vm VM_KIND=-backports BACKPORTS_KERNEL=1

# How long it takes from the start of the kernel to the root, against squashfs and
# overlayfs.
bench-vm: VM_KIND = -dracut
bench-vm: export INITRAMFS = dracut
bench-vm: build
	$(VM_OVERLAY)
	@$(MAKE) --no-print-directory live-image BASELINE=1 OVERLAY='$(CURDIR)/$(VM_DIR)/overlay' OUT='$(CURDIR)/$(VM_DIR)/baseline.img'
	@status=0; $(VM_ENV) SPROUTD_VM_BASELINE='$(CURDIR)/$(VM_DIR)/baseline.img' \
		$(GO) test -v -count=1 -timeout 8h -run '^$$' -bench TimeToRoot -benchtime 5x ./tests/vm || status=$$?; $(GIVE_BACK); exit $$status

INSTALL_DATA = install -D -m 0644

install: build
	install -D -m 0755 bin/sproutd '$(DESTDIR)$(LIBEXECDIR)/sproutd'
	install -D -m 0755 bin/sprout-initrd '$(DESTDIR)$(LIBEXECDIR)/sprout-initrd'
	install -D -m 0755 bin/sproutctl '$(DESTDIR)$(BINDIR)/sproutctl'
	$(INSTALL_DATA) data/65-sproutd.rules '$(DESTDIR)$(UDEVDIR)/65-sproutd.rules'
	$(INSTALL_DATA) data/run-sprout-media.mount.conf '$(DESTDIR)$(UNITDIR)/run-sprout-media.mount.d/sproutd.conf'
	install -D -m 0755 -t '$(DESTDIR)$(DRACUTDIR)/70sprout' data/dracut/70sprout/*
	install -D -m 0755 data/initramfs-tools/hooks/sprout '$(DESTDIR)$(INITRAMFSDIR)/hooks/sprout'
	$(INSTALL_DATA) data/initramfs-tools/scripts/sprout '$(DESTDIR)$(INITRAMFSDIR)/scripts/sprout'
	sed -i 's|/usr/libexec/|$(LIBEXECDIR)/|g' '$(DESTDIR)$(DRACUTDIR)/70sprout/module-setup.sh' '$(DESTDIR)$(INITRAMFSDIR)/hooks/sprout'
	install -d '$(DESTDIR)$(UNITDIR)'
	sed 's|@libexecdir@|$(LIBEXECDIR)|g' data/sproutd.service.in >'$(DESTDIR)$(UNITDIR)/sproutd.service'
	chmod 0644 '$(DESTDIR)$(UNITDIR)/sproutd.service'
	install -d '$(DESTDIR)$(GENERATORDIR)'
	sed 's|@unitdir@|$(UNITDIR)|g' data/sproutd-generator.in >'$(DESTDIR)$(GENERATORDIR)/sproutd-generator'
	chmod 0755 '$(DESTDIR)$(GENERATORDIR)/sproutd-generator'
	$(INSTALL_DATA) data/org.sproutd.Sprout1.service '$(DESTDIR)$(DATADIR)/dbus-1/system-services/org.sproutd.Sprout1.service'
	$(INSTALL_DATA) data/org.sproutd.Sprout1.conf '$(DESTDIR)$(DATADIR)/dbus-1/system.d/org.sproutd.Sprout1.conf'
	$(INSTALL_DATA) data/org.sproutd.sprout1.policy '$(DESTDIR)$(DATADIR)/polkit-1/actions/org.sproutd.sprout1.policy'
	install -d '$(DESTDIR)$(DATADIR)'/{bash-completion/completions,zsh/site-functions,fish/vendor_completions.d}
	bin/sproutctl completion bash >'$(DESTDIR)$(DATADIR)/bash-completion/completions/sproutctl'
	bin/sproutctl completion zsh >'$(DESTDIR)$(DATADIR)/zsh/site-functions/_sproutctl'
	bin/sproutctl completion fish >'$(DESTDIR)$(DATADIR)/fish/vendor_completions.d/sproutctl.fish'
	for page in $(wildcard docs/*.1 docs/*.5 docs/*.7 docs/*.8); do \
		$(INSTALL_DATA) "$$page" '$(DESTDIR)$(MANDIR)'/man"$${page##*.}/$${page##*/}" || exit; \
	done

uninstall:
	rm -rf '$(DESTDIR)$(DRACUTDIR)/70sprout'
	rm -f '$(DESTDIR)$(LIBEXECDIR)/sproutd' '$(DESTDIR)$(LIBEXECDIR)/sprout-initrd' '$(DESTDIR)$(BINDIR)/sproutctl' '$(DESTDIR)$(UNITDIR)/sproutd.service' \
		'$(DESTDIR)$(GENERATORDIR)/sproutd-generator' \
		'$(DESTDIR)$(UDEVDIR)/65-sproutd.rules' '$(DESTDIR)$(UNITDIR)/run-sprout-media.mount.d/sproutd.conf' \
		'$(DESTDIR)$(INITRAMFSDIR)/hooks/sprout' '$(DESTDIR)$(INITRAMFSDIR)/scripts/sprout' \
		'$(DESTDIR)$(DATADIR)/dbus-1/system-services/org.sproutd.Sprout1.service' \
		'$(DESTDIR)$(DATADIR)/dbus-1/system.d/org.sproutd.Sprout1.conf' \
		'$(DESTDIR)$(DATADIR)/polkit-1/actions/org.sproutd.sprout1.policy' \
		'$(DESTDIR)$(DATADIR)/bash-completion/completions/sproutctl' \
		'$(DESTDIR)$(DATADIR)/zsh/site-functions/_sproutctl' \
		'$(DESTDIR)$(DATADIR)/fish/vendor_completions.d/sproutctl.fish' \
		$(foreach page,$(notdir $(wildcard docs/*.1 docs/*.5 docs/*.7 docs/*.8)),'$(DESTDIR)$(MANDIR)/man$(subst .,,$(suffix $(page)))/$(page)')

clean:
	rm -rf bin .cache
