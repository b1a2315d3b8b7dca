# SPDX-License-Identifier: Apache-2.0
.PHONY: build image install generate test unit e2e fuzz lint bench demo clean setup go
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec

PREFIX    ?= /usr/local
BIN       ?= bin
IMAGE     ?= localhost/holdfast
VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
FUZZTIME  ?= 5s
# Flags of the demo and the benchmark: make demo ARGS=-help
ARGS      ?=
# What go.podman.io/{image,storage} need to build without C libraries.
TAGS      := exclude_graphdriver_btrfs,containers_image_openpgp
export GOFLAGS := $(shell go env GOFLAGS 2>/dev/null) -tags=$(TAGS)
LDFLAGS   := -s -w -X github.com/holdfast/holdfast/internal/daemon.Version=$(VERSION) -X main.Version=$(VERSION)

build: go
	CGO_ENABLED=0 go build -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/holdfast ./cmd/holdfast-operator

image: build
	buildah build --network=none --build-arg VERSION=$(VERSION) -f deploy/Containerfile -t $(IMAGE) .

install: build
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(BIN)/holdfast $(BIN)/holdfast-operator $(DESTDIR)$(PREFIX)/bin/
	ln -sfn holdfast $(DESTDIR)$(PREFIX)/bin/holdfast-pull-hook
	install -d $(DESTDIR)/etc/{systemd/system,tmpfiles.d,containers/registries.conf.d} $(DESTDIR)$(PREFIX)/share/doc/holdfast
	for unit in holdfast holdfast-agent; do sed 's|/usr/local|$(PREFIX)|g' deploy/$$unit.service > $(DESTDIR)/etc/systemd/system/$$unit.service; done
	sed 's|/usr/local|$(PREFIX)|g' deploy/registries.conf.d/50-holdfast.conf > $(DESTDIR)/etc/containers/registries.conf.d/50-holdfast.conf
	install -m 644 deploy/tmpfiles.d/holdfast.conf $(DESTDIR)/etc/tmpfiles.d/holdfast.conf
	install -m 644 deploy/storage.conf deploy/crio.conf.d/50-holdfast-artifacts.conf $(DESTDIR)$(PREFIX)/share/doc/holdfast/
	test -e $(DESTDIR)/etc/holdfast/config.toml || install -D -m 644 internal/config/default.toml $(DESTDIR)/etc/holdfast/config.toml

test: setup unit e2e

unit: go
	go test -race -timeout 15m ./api/... ./cmd/... ./deploy/... ./internal/...

e2e: go
	go test -count=1 -p 1 -timeout 30m ./test/...

fuzz: go
	grep -roE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]+' api cmd internal | sort | while IFS=: read -r file name; do \
	  go test -run '^$$' -fuzz "^$${name#func }$$" -fuzztime $(FUZZTIME) "./$$(dirname "$$file")"; done

generate: go
	for group in api/v1 api/holdfast/v1; do \
	  go tool -modfile=tools/generate/go.mod controller-gen object:headerFile=tools/generate/header.txt crd:maxDescLen=400 output:crd:dir=$$group/crds paths=./$$group; done

lint: go bin/golangci-lint generate
	git diff --exit-code -- api # what `make generate` makes is committed
	@test -z "$$(gofmt -l . | tee /dev/stderr)" || { echo 'gofmt -w . puts these right'; exit 1; }
	bin/golangci-lint run ./...

bin/golangci-lint: tools/go.mod tools/go.sum
	cd tools && go build -o ../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

demo bench: setup build
	CGO_ENABLED=0 go build -o bin/$@ ./test/$@
	bin/$@ $(ARGS)

setup:
	@test/setup.sh

go:
	@test/setup.sh go

clean:
	rm -rf bin .demo .bench
