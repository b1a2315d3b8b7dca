// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"strconv"
)

// How much of a list is asked for at a time, and taken altogether.
const (
	listPage = 1000
	maxList  = 20_000
)

// Tags returns the tags of the repository, of at most 20,000.
func (r *Repository) Tags(ctx context.Context) ([]string, error) {
	all, err := r.list(ctx, "tags/list", func(body []byte) ([]string, error) {
		var page struct {
			Tags []string `json:"tags"`
		}
		err := json.Unmarshal(body, &page)
		return page.Tags, err
	})
	if err != nil {
		return nil, fmt.Errorf("listing tags of %s: %w", r.name, err)
	}
	return all, nil
}

// Catalog returns the repositories of the whole registry, of which this one is any. Not
// every registry tells.
func (r *Repository) Catalog(ctx context.Context) ([]string, error) {
	all, err := r.list(ctx, "/_catalog", func(body []byte) ([]string, error) {
		var page struct {
			Repositories []string `json:"repositories"`
		}
		err := json.Unmarshal(body, &page)
		return page.Repositories, err
	})
	if err != nil {
		return nil, fmt.Errorf("listing the repositories of %s: %w", r.registry.Name(), err)
	}
	return all, nil
}

// list reads a list page by page; see the OCI distribution specification, "Content
// Discovery".
func (r *Repository) list(ctx context.Context, resource string, decode func([]byte) ([]string, error)) ([]string, error) {
	var all []string
	for {
		query := url.Values{"n": {strconv.Itoa(listPage)}}
		if len(all) > 0 {
			query.Set("last", all[len(all)-1])
		}
		doc, _, err := r.document(ctx, resource+"?"+query.Encode())
		if err != nil {
			return nil, err
		}
		page, err := decode(doc.Body)
		if err != nil {
			return nil, err
		}
		if len(page) == 0 || len(all) > 0 && page[0] <= all[len(all)-1] { // no more, or it starts over
			return all, nil
		}
		all = append(all, page...)
		if len(page) < listPage {
			return all, nil
		}
		if len(all) >= maxList {
			return nil, fmt.Errorf("there are more than %d", maxList)
		}
	}
}
