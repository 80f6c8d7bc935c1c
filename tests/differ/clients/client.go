// The HTTP client in Go of the comparison of languages: see client.c, which does the same.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"sync"
	"time"
)

const (
	port  = "7014"
	limit = 20 * time.Second
)

func fetch(client *http.Client, url string) (body string, info httptrace.GotConnInfo, err error) {
	trace := &httptrace.ClientTrace{GotConn: func(got httptrace.GotConnInfo) { info = got }}
	request, err := http.NewRequestWithContext(httptrace.WithClientTrace(context.Background(), trace), "GET", url, nil)
	if err != nil {
		return
	}
	answer, err := client.Do(request)
	if err != nil {
		return
	}
	defer answer.Body.Close()
	bytes, err := io.ReadAll(answer.Body)
	return string(bytes), info, err
}

func main() {
	for _, name := range os.Args[1:] {
		// Both resolvers: Go's own, and the C library's where the program is linked with it.
		for _, own := range []bool{true, false} {
			resolver := &net.Resolver{PreferGo: own}
			addresses, err := resolver.LookupHost(context.Background(), name)
			fmt.Println(name, "is", addresses, err)
		}
		client := &http.Client{Timeout: limit, Transport: &http.Transport{DisableKeepAlives: true}}
		body, info, err := fetch(client, "http://"+name+":"+port+"/once")
		if err != nil {
			fmt.Println(name, "failed:", err)
			continue
		}
		local, _, _ := net.SplitHostPort(info.Conn.LocalAddr().String())
		chunked, _, err := fetch(client, "http://"+name+":"+port+"/chunked")
		fmt.Println(name, "at", info.Conn.RemoteAddr(), "from", local+":", body, chunked, err)
	}
	client := &http.Client{Timeout: limit}
	for number := 0; number < 5; number++ {
		body, info, err := fetch(client, fmt.Sprintf("http://far.test:%s/kept/%d", port, number))
		fmt.Println("kept:", body, info.Reused, err)
	}
	var all sync.WaitGroup
	var lock sync.Mutex
	right := 0
	for number := 0; number < 100; number++ {
		all.Add(1)
		go func(number int) {
			defer all.Done()
			alone := &http.Client{Timeout: limit, Transport: &http.Transport{DisableKeepAlives: true}}
			body, _, err := fetch(alone, fmt.Sprintf("http://far.test:%s/many/%d", port, number))
			if err == nil && body == fmt.Sprintf("you asked for /many/%d", number) {
				lock.Lock()
				right++
				lock.Unlock()
			}
		}(number)
	}
	all.Wait()
	fmt.Println("many:", right)
	_, err := net.DialTimeout("tcp", "nowhere.test:"+port, limit)
	fmt.Println("unknown name:", err != nil)
}
