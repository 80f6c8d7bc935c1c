// Asks for names, and for the text of the last one, by Go's own resolver.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
)

func main() {
	resolver := &net.Resolver{PreferGo: true}
	for _, name := range os.Args[1 : len(os.Args)-1] {
		addresses, err := resolver.LookupHost(context.Background(), name)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		for _, address := range addresses {
			fmt.Println(address)
		}
	}
	texts, err := resolver.LookupTXT(context.Background(), os.Args[len(os.Args)-1])
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	length := 0
	for _, text := range texts {
		length += len(text)
	}
	fmt.Println("text", length)
}
